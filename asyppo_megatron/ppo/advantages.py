"""Rewards on tokens, generalised advantage estimation over packed sequences, and group advantages.

GAE: Schulman et al., arXiv 1506.02438, with the corrected value of AsyPPO (arXiv 2510.01656, Eq. 3).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from asyppo_megatron.ppo.segments import group_numbers, segment_sum, token_counts, working_dtype, zero_outside
from asyppo_megatron.types import lengths

GROUP_ADVANTAGES = ("grpo", "dr_grpo", "rloo")

# Distances from the end that GAE reads at once: for 2,048 sequences a block stays in a core's cache.
_BLOCK = 64


def terminal_rewards(rewards: torch.Tensor, loss_mask: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Put each trajectory's reward on the last position whose action the policy generated.

    A truncated response ends there like any other. A trajectory without such a position gets no reward.

    Args:
        rewards: f32 [N].
        loss_mask: bool [T].
        cu_seqlens: i32 [N + 1].

    Returns:
        f32 [T], 0 everywhere else.
    """
    size = loss_mask.numel()
    result = torch.zeros(size + 1, dtype=working_dtype(rewards), device=loss_mask.device)
    if size == 0:
        return result[:0]
    cu = cu_seqlens.to(loss_mask.device, non_blocking=True).long()
    running = loss_mask.cumsum(0, dtype=torch.int32)
    ends = running[(cu[1:] - 1).clamp(min=0)]
    last = torch.searchsorted(running, ends)
    # Sequences without a trainable token write to the spare slot at the end.
    slot = torch.where(token_counts(loss_mask, cu) > 0, last, size)
    return result.index_copy_(0, slot, rewards.to(result))[:size]


def gae(
    token_rewards: torch.Tensor,
    values: torch.Tensor,
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    gamma: float,
    lam: float | torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and lambda-returns over the trainable tokens of each sequence, all others skipped.

    With i and i + 1 consecutive trainable tokens, and V = 0 after the last:

        G_i = r_i + gamma ((1 - lambda) V_{i+1} + lambda G_{i+1}),   A_i = G_i - V_i

    which is the sum over l of (gamma lambda)^l delta_{i+l}, delta_i = r_i + gamma V_{i+1} - V_i, written
    so that gamma = lambda = 1 is exactly the reverse sum of rewards minus the value. The recursion's
    state is float64 whatever the inputs. It steps over time for all sequences at once: a cumulative sum over
    packed tokens would mix sequences, and on CUDA adds in an order that changes from run to run.

    Args:
        token_rewards: f32 [T].
        values: f32 [T], the corrected value.
        loss_mask: bool [T].
        cu_seqlens: i32 [N + 1]; on the CPU, else it is copied there.
        gamma: discount factor.
        lam: lambda; or f32 [N], one for each sequence.

    Returns:
        advantages: f32 [T], 0 outside `loss_mask`.
        returns: f32 [T], advantages + values; 0 outside `loss_mask`.
    """
    dtype = working_dtype(token_rewards, values)
    size = loss_mask.numel()
    order, blocks = _blocks_from_the_end(cu_seqlens, values.device)
    lam = _per_sequence(lam, order)
    following_return, following_value = torch.zeros_like(lam), torch.zeros_like(lam)
    # Positions that do not count write to the spare slot at the end.
    returns = torch.zeros(size + 1, dtype=dtype, device=values.device)
    for position in blocks:
        readable = position.clamp(min=0)
        mask = loss_mask[readable] & (position >= 0)
        reward = zero_outside(token_rewards[readable], mask, dtype)
        value = values[readable].to(dtype)
        now = slice(position.shape[1])
        found = _scan(reward, value, mask, following_return[now], following_value[now], gamma, lam[now])
        returns[torch.where(mask, position, size)] = found
    returns = returns[:size]
    return zero_outside(returns - values, loss_mask), returns


def _scan(
    reward: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    following_return: torch.Tensor,
    following_value: torch.Tensor,
    gamma: float,
    lam: torch.Tensor,
) -> torch.Tensor:
    """Run the recursion of `gae` down the rows of one block, advancing the two states in place.

    Args:
        reward: [b, n], as `value`.
        mask: bool [b, n].
        following_return: f64 [n], G of the trainable token after the block; as `following_value`.
        lam: f64 [n].

    Returns:
        [b, n], G; of no meaning where the mask is false.
    """
    found = torch.empty_like(reward)
    for r, v, counts, out in zip(reward, value, mask, found, strict=True):
        target = torch.add(r, torch.lerp(following_value, following_return, lam), alpha=gamma)
        following_return.copy_(torch.where(counts, target, following_return))
        following_value.copy_(torch.where(counts, v, following_value))
        out.copy_(following_return)
    return found


def _blocks_from_the_end(cu_seqlens: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, Iterator[torch.Tensor]]:
    """Walk all sequences of a packed batch at once, from their ends, some distances at a time.

    The longest sequence comes first, so the sequences that reach a distance are the first n; nothing is
    ever padded to the longest, and no index of the batch's size is held.

    Returns:
        order: i64 [N], sequences by falling length.
        blocks: i64 [b, n], position in the batch at b successive distances from the end of the first n
            sequences in that order; negative before the start of a sequence.
    """
    cu = cu_seqlens.cpu().long()
    sizes, order = torch.sort(lengths(cu), descending=True, stable=True)
    starts, ends = cu[:-1][order].to(device, non_blocking=True), cu[1:][order].to(device, non_blocking=True)
    longest = int(sizes[0]) if sizes.numel() else 0

    def blocks() -> Iterator[torch.Tensor]:
        for first in range(0, longest, _BLOCK):
            active = int((sizes > first).sum())
            distance = torch.arange(first, min(first + _BLOCK, longest), device=device).unsqueeze(1)
            position = ends[:active] - 1 - distance
            yield torch.where(position >= starts[:active], position, -1)

    return order.to(device, non_blocking=True), blocks()


def _per_sequence(lam: float | torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Lambda of each sequence in the given order, f64 [N]."""
    if isinstance(lam, torch.Tensor):
        return lam.to(order.device, torch.float64, non_blocking=True)[order]
    return torch.full(order.shape, float(lam), dtype=torch.float64, device=order.device)


def length_adaptive_lambda(loss_mask: torch.Tensor, cu_seqlens: torch.Tensor, alpha: float = 0.05) -> torch.Tensor:
    """The actor's lambda of VAPO (arXiv 2504.05118): max(0, 1 - 1 / (alpha l)) for a response of l tokens.

    Args:
        loss_mask: bool [T].
        cu_seqlens: i32 [N + 1].
        alpha: how fast lambda approaches 1 with length.

    Returns:
        f32 [N]; 0 where a response has no trainable token.
    """
    count = token_counts(loss_mask, cu_seqlens).float()
    return (1.0 - 1.0 / (alpha * count)).clamp(min=0.0)


def group_advantages(rewards: torch.Tensor, group_ids: torch.Tensor, how: str = "grpo") -> torch.Tensor:
    """Advantage of each trajectory relative to the others of its group.

        grpo     (r - mean) / (std + 1e-6), sample standard deviation      (arXiv 2402.03300)
        dr_grpo  r - mean                                                  (arXiv 2503.20783)
        rloo     r - mean of the others                                    (arXiv 2402.14740)

    Computed in float64 on rewards shifted by the group's largest, so that equal rewards give exactly 0.
    A group of one gets 0.

    Args:
        rewards: f32 [N].
        group_ids: i64 [N].
        how: "grpo", "dr_grpo" or "rloo".

    Returns:
        f32 [N].
    """
    if how not in GROUP_ADVANTAGES:
        raise ValueError(f"group advantage: got {how!r}, need one of {', '.join(GROUP_ADVANTAGES)}")
    count = rewards.numel()
    group = group_numbers(group_ids.to(rewards.device, non_blocking=True))
    r = rewards.double()
    largest = torch.full((count,), -torch.inf, dtype=r.dtype, device=r.device).scatter_reduce_(0, group, r, "amax")
    r = r - largest[group]
    size = segment_sum(torch.ones_like(r), group, count)[group]
    total = segment_sum(r, group, count)[group]
    if how == "rloo":
        result = r - (total - r) / (size - 1).clamp(min=1)
    else:
        result = r - total / size
    if how == "grpo":
        variance = segment_sum(result.square(), group, count)[group] / (size - 1).clamp(min=1)
        result = result / (variance.sqrt() + 1e-6)
    return result.to(working_dtype(rewards))
