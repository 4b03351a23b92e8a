"""Hugging Face checkpoints and Megatron models: one mapping, exact both ways."""
