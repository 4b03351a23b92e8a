"""Full Hugging Face tensors to one rank's Megatron shard and back: pure, exact, one function a direction.

`shard` slices before it copies, so that tensors mapped from a file are read only where this rank needs them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from asyppo_megatron.convert.rows import Kind
from asyppo_megatron.models.spec import ModelSpec


def _cut(tensor: Tensor, rank: int, parts: int, dim: int = 0) -> Tensor:
    size = tensor.shape[dim] // parts
    return tensor.narrow(dim, rank * size, size)


def _by_group(tensor: Tensor, groups: int) -> Tensor:
    return tensor.reshape(groups, -1, *tensor.shape[1:])


def _vocab_shard(table: Tensor, rank: int, tp: int, spec: ModelSpec) -> Tensor:
    rows = spec.padded_vocab(tp) // tp
    first = min(rank * rows, spec.vocab_size)
    part = table[first : min(first + rows, spec.vocab_size)]
    if part.shape[0] == rows:
        return part
    return torch.cat([part, part.new_zeros(rows - part.shape[0], *part.shape[1:])])


def shard(kind: Kind, tensors: Sequence[Tensor], tp_rank: int, tp: int, spec: ModelSpec) -> Tensor:
    """One tp rank's Megatron parameter.

    Args:
        kind: how the tensors combine.
        tensors: full Hugging Face tensors in table order.

    Returns:
        The shard; a view of `tensors` where nothing has to be rearranged.
    """
    if kind is Kind.REPLICATED:
        return tensors[0]
    if kind is Kind.COLUMN:
        return _cut(tensors[0], tp_rank, tp)
    if kind is Kind.ROW:
        return _cut(tensors[0], tp_rank, tp, dim=1)
    if kind is Kind.VOCAB:
        return _vocab_shard(tensors[0], tp_rank, tp, spec)
    parts = [_cut(t, tp_rank, tp) for t in tensors]
    if kind is Kind.GATE_UP:
        return torch.cat(parts)
    groups = spec.num_kv_heads // tp
    return torch.cat([_by_group(p, groups) for p in parts], dim=1).flatten(0, 1)


def _merge_qkv(shards: Sequence[Tensor], spec: ModelSpec) -> list[Tensor]:
    queries = spec.num_heads // spec.num_kv_heads * spec.head_dim
    sizes = (queries, spec.head_dim, spec.head_dim)
    split = [_by_group(s, spec.num_kv_heads // len(shards)).split(sizes, dim=1) for s in shards]
    return [torch.cat(parts).flatten(0, 1) for parts in zip(*split, strict=True)]


def merge(kind: Kind, shards: Sequence[Tensor], spec: ModelSpec) -> list[Tensor]:
    """The full Hugging Face tensors of one Megatron parameter; inverse of `shard`.

    Args:
        kind: how the tensors combine.
        shards: the parameter of every tp rank, in rank order.

    Returns:
        Contiguous tensors in table order; with one shard a plain parameter comes back as it is, not copied.
    """
    if kind is Kind.REPLICATED:
        return [shards[0]]
    if kind is Kind.QKV:
        return _merge_qkv(shards, spec)
    if kind is Kind.GATE_UP:
        halves = [s.chunk(2) for s in shards]
        if len(shards) == 1:
            return list(halves[0])
        return [torch.cat(parts) for parts in zip(*halves, strict=True)]
    full = shards[0] if len(shards) == 1 else torch.cat(list(shards), dim=1 if kind is Kind.ROW else 0)
    return [full[: spec.vocab_size] if kind is Kind.VOCAB else full]
