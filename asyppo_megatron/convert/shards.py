"""Full Hugging Face tensors to one rank's Megatron shard and back: pure, exact, one function a direction.

`shard` slices before it copies, so that tensors mapped from a file are read only where this rank needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Span:
    """Where one tp rank's part of a Hugging Face tensor lies in the whole.

    Attributes:
        tensor: number of the tensor in table order.
        dim: the axis that is cut.
        start, length: along that axis.
    """

    tensor: int
    dim: int
    start: int
    length: int


def spans(kind: Kind, shapes: Sequence[tuple[int, ...]], tp_rank: int, tp: int, spec: ModelSpec) -> list[Span]:
    """The parts that one tp rank's Megatron parameter holds of the full Hugging Face tensors; pure arithmetic.

    Args:
        shapes: full shapes of the tensors in table order.

    Returns:
        At most one span a tensor. A replicated parameter counts as rank 0's, rows that pad a vocabulary as nobody's.
    """
    if kind is Kind.REPLICATED:
        return [Span(0, 0, 0, shapes[0][0])] if tp_rank == 0 else []
    if kind is Kind.ROW:
        size = shapes[0][1] // tp
        return [Span(0, 1, tp_rank * size, size)]
    if kind is Kind.VOCAB:
        rows = spec.padded_vocab(tp) // tp
        start = min(tp_rank * rows, spec.vocab_size)
        length = min(start + rows, spec.vocab_size) - start
        return [Span(0, 0, start, length)] if length else []
    return [Span(i, 0, tp_rank * (shape[0] // tp), shape[0] // tp) for i, shape in enumerate(shapes)]


def parts(kind: Kind, shard: Tensor, tp_rank: int, tp: int, spec: ModelSpec) -> list[Tensor]:
    """The data of `spans` in a rank's Megatron parameter: views, in the same order.

    A query, key or value part is [groups, rows, ...]: reshaped to [groups * rows, ...] it is the span.
    """
    if kind is Kind.REPLICATED:
        return [shard] if tp_rank == 0 else []
    if kind is Kind.VOCAB:
        rows = shard.shape[0]
        length = min(tp_rank * rows + rows, spec.vocab_size) - min(tp_rank * rows, spec.vocab_size)
        return [shard[:length]] if length else []
    if kind is Kind.GATE_UP:
        return list(shard.chunk(2))
    if kind is Kind.QKV:
        queries = spec.num_heads // spec.num_kv_heads * spec.head_dim
        return list(_by_group(shard, spec.num_kv_heads // tp).split((queries, spec.head_dim, spec.head_dim), dim=1))
    return [shard]
