"""Reductions over the sequences of a packed `[T]` tensor and over groups of trajectories.

Nothing here waits for the device, provided `cu_seqlens` is where its user says; every reduction has one
order of additions, so the same input gives the same bits on every rank.
"""

from __future__ import annotations

import torch

from asyppo_megatron.types import sequence_ids


def working_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """float64 when any input is float64, else float32: losses and scans are never computed in 16 bits."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def zero_outside(x: torch.Tensor, mask: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`x` where `mask`, else 0. Whatever stood there, NaN included, reaches neither a value nor a gradient.

    Args:
        x: [..., T].
        mask: bool [T].
        dtype: dtype of the result, that of `x` by default.
    """
    x = x if dtype is None else x.to(dtype)
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


def token_sequences(mask: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Index of the sequence of every position, i64 [T], on the device of `mask`."""
    return sequence_ids(cu_seqlens.to(mask.device, non_blocking=True), mask.numel(), mask.device)


def token_counts(mask: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """True positions of `mask` in each sequence, i64 [N], on the device of `mask`."""
    if mask.numel() == 0:
        return torch.zeros(cu_seqlens.numel() - 1, dtype=torch.long, device=mask.device)
    cu = cu_seqlens.to(mask.device, non_blocking=True).long()
    running = mask.cumsum(0, dtype=torch.int32)
    before = torch.where(cu > 0, running[(cu - 1).clamp(min=0)], 0)
    return (before[1:] - before[:-1]).long()


def first_and_last(mask: torch.Tensor, cu_seqlens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and the last true position of `mask` in each sequence.

    Returns:
        first: bool [T].
        last: bool [T].
    """
    if mask.numel() == 0:
        return mask.clone(), mask.clone()
    sequences = token_sequences(mask, cu_seqlens)
    counts = token_counts(mask, cu_seqlens)
    within = mask.cumsum(0, dtype=torch.int32) - (counts.cumsum(0) - counts)[sequences]
    return mask & (within == 1), mask & (within == counts[sequences])


def segment_sum(x: torch.Tensor, segments: torch.Tensor, count: int) -> torch.Tensor:
    """Sum of `x` over each segment, differentiable: added up in float64, rounded once to the dtype of `x`.

    `index_put` with accumulate adds in index order (CUDA sorts the indices first), unlike `index_add`,
    whose atomics reorder the additions from run to run.

    Args:
        x: float [T].
        segments: i64 [T], segment of each element, 0 <= segment < count.
        count: number of segments.
    """
    total = torch.zeros(count, dtype=torch.float64, device=x.device)
    return total.index_put((segments,), x.double(), accumulate=True).to(x.dtype)


def group_numbers(group_ids: torch.Tensor) -> torch.Tensor:
    """Number each trajectory's group 0, 1, ... in ascending order of the ids, i64 [N]."""
    ids, order = torch.sort(group_ids, stable=True)
    starts = torch.zeros_like(ids)
    starts[1:] = ids[1:] != ids[:-1]
    return torch.empty_like(order).index_copy_(0, order, starts.cumsum(0))
