"""Llama 3.x: the plain decoder layer; rope scaling has no tensors."""

from asyppo_megatron.convert.rows import ATTENTION, MLP, NORMS

LAYER = (*NORMS, *ATTENTION, *MLP)
