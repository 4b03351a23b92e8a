"""The demo task: small enough for a laptop CPU, hard enough to need reinforcement learning."""
