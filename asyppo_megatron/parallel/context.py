"""The tokens of a pack split over context-parallel ranks, and their way back.

Every sequence of a pack is a multiple of 2 cp tokens long and cut into 2 cp equal chunks; rank r holds chunks r and
2 cp - 1 - r of each. Under causal attention every rank then has the same number of pairs of query and key, and it is
the order that Transformer Engine expects.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from asyppo_megatron.types import sequence_ids


def split_positions(cu_seqlens: torch.Tensor, size: int) -> torch.Tensor:
    """Positions in the pack of every rank's tokens, i64 [size, t / size], in each rank's order.

    Args:
        cu_seqlens: i32 [n + 1], on the CPU, every sequence a multiple of 2 size.
        size: context-parallel ranks.
    """
    cu = cu_seqlens.long()
    if bool((cu % (2 * size)).any()):
        raise ValueError(f"context parallelism: got sequences of other lengths than multiples of {2 * size}")
    total = int(cu[-1]) // size
    sequence = sequence_ids((cu // size).to(torch.int32), total)
    offset = torch.arange(total) - (cu // size)[sequence]
    chunk = ((cu[1:] - cu[:-1]) // (2 * size))[sequence]
    is_second = offset >= chunk
    rank = torch.arange(size).unsqueeze(1)
    number = torch.where(is_second, 2 * size - 1 - rank, rank)
    return cu[sequence] + number * chunk + offset - is_second * chunk


@dataclass(frozen=True)
class ContextSplit:
    """One pack's tokens over the ranks of a context-parallel group.

    Attributes:
        positions: i64 [t / cp], position in the pack of each token of this rank.
        inverse: i64 [t], where each token of the pack is in the concatenation of all ranks' tokens.
        group: the context-parallel group.
    """

    positions: torch.Tensor
    inverse: torch.Tensor
    group: Any

    @classmethod
    def of(cls, cu_seqlens: torch.Tensor, group: Any, device: torch.device) -> ContextSplit:
        """The split of a pack (`cu_seqlens` i32 [n + 1], on the CPU) for the calling rank of `group`."""
        positions = split_positions(cu_seqlens, dist.get_world_size(group))
        inverse = torch.empty(positions.numel(), dtype=torch.long)
        inverse[positions.flatten()] = torch.arange(positions.numel())
        own = positions[dist.get_rank(group)]
        return cls(own.to(device, non_blocking=True), inverse.to(device, non_blocking=True), group)

    def local(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's tokens [t / cp, ...] of a pack's [t, ...]."""
        return x.index_select(0, self.positions)

    def gather(self, x: torch.Tensor, *, sum_gradients: bool) -> torch.Tensor:
        """All tokens [t, ...] of the pack from each rank's [t / cp, ...]; called by every rank of the group.

        Args:
            sum_gradients: the ranks use the result differently, so a token's gradient is the sum over them (keys and
                values of attention). False where all of them compute the same number from it, which counts once.
        """
        whole: torch.Tensor = _Gather.apply(x, self, sum_gradients)
        return whole


class _Gather(torch.autograd.Function):
    """One all-gather forward; backward a reduce-scatter, or nothing but a choice of rows."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, split: ContextSplit, sum_gradients: bool) -> torch.Tensor:
        ctx.split, ctx.sum_gradients = split, sum_gradients
        size = dist.get_world_size(split.group)
        gathered = x.new_empty(size * x.size(0), *x.shape[1:])
        dist.all_gather_into_tensor(gathered, x.contiguous(), group=split.group)
        return gathered.index_select(0, split.inverse)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        split: ContextSplit = ctx.split
        if not ctx.sum_gradients:
            return split.local(grad), None, None
        by_rank = torch.empty_like(grad).index_copy_(0, split.inverse, grad)
        own = grad.new_empty(split.positions.numel(), *grad.shape[1:])
        dist.reduce_scatter_tensor(own, by_rank, group=split.group)
        return own, None, None
