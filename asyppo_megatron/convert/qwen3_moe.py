"""Qwen3-MoE: Qwen3's attention, and in every layer a router and experts in place of the MLP."""

from asyppo_megatron.convert.rows import ATTENTION, EXPERTS, NORMS, QK_NORM

LAYER = (*NORMS, *ATTENTION, *QK_NORM, *EXPERTS)
