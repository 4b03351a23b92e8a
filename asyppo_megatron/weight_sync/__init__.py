"""How a trained actor's weights reach the rollout engines."""
