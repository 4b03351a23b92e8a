"""Qwen3 dense (0.6B to 32B): normalised query and key heads, no biases."""

from asyppo_megatron.convert.rows import ATTENTION, MLP, NORMS, QK_NORM

LAYER = (*NORMS, *ATTENTION, *QK_NORM, *MLP)
