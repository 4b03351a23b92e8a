"""Rollouts: the driver process, datasets, the engine protocol and its engines, the journal."""
