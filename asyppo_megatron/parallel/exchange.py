"""What all ranks of the world tell each other in a step: the batch, the roles' scores, a checksum, metrics.

Every function here is a collective of the world, called by every rank in the same order. All of them move
tensors, never objects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist

from asyppo_megatron.types import PackedBatch

_NUM_HEADER = 5


def broadcast_batch(
    arrays: Mapping[str, np.ndarray] | None, header: Sequence[int] | None, device: torch.device
) -> PackedBatch:
    """Rank 0's packed arrays to every rank: 9 bytes a token (id, mask, rollout logprob) and 25 a trajectory.

    Dense rewards, where the arrays have them, take 4 bytes a token more.

    Args:
        arrays: the arrays of `types.pack_trajectories`; None on ranks other than 0.
        header: (step, policy_version, T, N) on rank 0.
        device: where the batch shall live (its `cu_seqlens` stays on the CPU).
    """
    known = [0] * _NUM_HEADER if arrays is None or header is None else [*header, int("token_rewards" in arrays)]
    head = torch.tensor(known, dtype=torch.int64, device=device)
    dist.broadcast(head, 0)
    step, version, tokens, count, dense = head.tolist()

    def share(name: str, size: int, dtype: torch.dtype) -> torch.Tensor:
        if arrays is not None:
            # The arrays may be read-only maps of a file: copy once, straight to where they are needed.
            x = torch.tensor(np.asarray(arrays[name]), device=device).to(dtype)
        else:
            x = torch.empty(size, dtype=dtype, device=device)
        dist.broadcast(x, 0)
        return x

    return PackedBatch(
        step=step,
        policy_version=version,
        tokens=share("tokens", tokens, torch.int32),
        cu_seqlens=share("cu_seqlens", count + 1, torch.int32).cpu(),
        loss_mask=share("loss_mask", tokens, torch.uint8).bool(),
        rollout_logprobs=share("rollout_logprobs", tokens, torch.float32),
        rewards=share("rewards", count, torch.float32),
        group_ids=share("group_ids", count, torch.int64),
        truncated=share("truncated", count, torch.uint8).bool(),
        token_rewards=share("token_rewards", tokens, torch.float32) if dense else None,
    )


def gather_scores(
    local: Mapping[str, torch.Tensor], names: Sequence[str], num_tokens: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """The roles' per-token results on every rank, f32 [T] each: 4 bytes a token and name on the wire.

    Every position of a name is non-zero on at most one rank, so the sum is exact and needs no order.

    Args:
        local: what this rank computed; names absent here count as zeros.
        names: all names, the same on every rank.
    """
    table = torch.zeros(len(names), num_tokens, dtype=torch.float32, device=device)
    for row, name in zip(table, names, strict=True):
        if name in local:
            row.copy_(local[name])
    dist.all_reduce(table)
    return dict(zip(names, table.unbind(), strict=True))


def sum_vector(values: torch.Tensor) -> list[float]:
    """Element-wise sum of a small f64 vector over the world, on the host: the one read of a step's metrics."""
    dist.all_reduce(values)
    return [float(v) for v in values.tolist()]


def max_vector(values: torch.Tensor) -> list[float]:
    """Element-wise maximum of a small f64 vector over the world, on the host."""
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return [float(v) for v in values.tolist()]


def disagreement(checksum: torch.Tensor) -> torch.Tensor:
    """0-dim bool: whether any two ranks of the world hold different checksums (0-dim i64)."""
    both = torch.stack([checksum, -checksum])
    dist.all_reduce(both, dist.ReduceOp.MAX)
    return both[0] != -both[1]
