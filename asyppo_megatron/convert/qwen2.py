"""Qwen2, Qwen2.5 and the DeepSeek-R1-Distill-Qwen models: biases on q, k and v."""

from asyppo_megatron.convert.rows import ATTENTION, MLP, NORMS, QKV_BIAS

LAYER = (*NORMS, *ATTENTION, *QKV_BIAS, *MLP)
