"""The ensemble of mini-critics: who trains on what, the corrected value, and agreement as two masks.

AsyPPO, arXiv 2510.01656: section 4.1 (disjoint shares), Eq. 3 (corrected value), Eq. 4 and 5 (masks).
"""

from __future__ import annotations

import torch

from asyppo_megatron.ppo.segments import working_dtype

REMAINDERS = ("error", "rotate", "drop")


def assign_critics(
    group_ids: torch.Tensor, num_critics: int, *, seed: int, step: int, remainder: str = "error"
) -> torch.Tensor:
    """Split every group's responses into disjoint equal shares, one for each critic (section 4.1).

    The j-th occurrence of a group id is response j of that group. Its place in the group's permutation
    is keyed by (seed, step, group id, j) alone, so it depends neither on the rank layout nor on the
    order in which groups arrive.

    Args:
        group_ids: i64 [N].
        num_critics: M.
        seed: of the run.
        step: training step.
        remainder: what to do where M does not divide a group of G responses: "error" refuses; "rotate"
            gives the G mod M left over to critics (step + group id) mod M and following, so that shares
            are equal over steps; "drop" leaves them to no critic.

    Returns:
        i8 [N], critic of each trajectory, -1 where dropped.
    """
    if num_critics < 1 or num_critics > 127:
        raise ValueError(f"num_critics: got {num_critics}, need 1 to 127")
    if remainder not in REMAINDERS:
        raise ValueError(f"remainder: got {remainder!r}, need one of {', '.join(REMAINDERS)}")
    ids, order = torch.sort(group_ids, stable=True)
    first = torch.searchsorted(ids, ids)
    size = torch.searchsorted(ids, ids, right=True) - first
    position = torch.arange(ids.numel(), device=ids.device)
    if remainder == "error" and bool((size % num_critics != 0).any()):
        raise ValueError(
            f"group of {int(size[size % num_critics != 0][0])} responses: need a multiple of {num_critics} "
            "critics; change the number of responses a prompt, or set remainder to rotate or drop"
        )
    by_key = torch.argsort(_keys(ids, position - first, seed, step), stable=True)
    order = order[by_key[torch.argsort(ids[by_key], stable=True)]]
    rank = position - first
    critic = (rank + (ids + step if remainder == "rotate" else 0)) % num_critics
    if remainder == "drop":
        critic = torch.where(rank < size - size % num_critics, critic, -1)
    return torch.empty_like(critic).index_copy_(0, order, critic).to(torch.int8)


def aggregate_values(values: torch.Tensor, how: str = "mean") -> torch.Tensor:
    """The corrected value Vbar of Eq. 3, or the pessimistic minimum of the paper's ablation (section 5.2).

    Args:
        values: f32 [M, T], M >= 1.
        how: "mean" or "min".

    Returns:
        f32 [T].
    """
    if values.dim() != 2 or values.shape[0] == 0:
        raise ValueError(f"values: got shape {tuple(values.shape)}, need [M, T] of at least one critic")
    values = values.to(working_dtype(values))
    if how == "mean":
        return values.mean(0)
    if how == "min":
        return values.amin(0)
    raise ValueError(f"value aggregation: got {how!r}, need mean or min")


def value_std(values: torch.Tensor) -> torch.Tensor:
    """Disagreement of the critics, sigma_t = population standard deviation over m of V_m(s_t).

    Args:
        values: f32 [M, T], M >= 1.

    Returns:
        f32 [T].
    """
    return (values - aggregate_values(values)).square().mean(0).sqrt()


def uncertainty_masks(
    std: torch.Tensor, loss_mask: torch.Tensor, *, k: float, h: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the advantage and the entropy bonus count (Eq. 4, Eq. 5).

    I_A = 0 on the floor(k n + 1e-9) valid tokens of lowest sigma, I_H = 0 on the floor(h n + 1e-9) of
    highest; among equal sigma the lower index is taken first, at both ends.

    Args:
        std: f32 [T], sigma.
        loss_mask: bool [T], true at the n valid tokens.
        k: fraction whose advantage is masked, 0 <= k <= 1.
        h: fraction whose entropy bonus is masked, 0 <= h <= 1.

    Returns:
        advantage_mask: bool [T], true where the advantage counts; false outside `loss_mask`.
        entropy_mask: bool [T], true where the entropy bonus counts; false outside `loss_mask`.
    """
    for name, fraction in (("k", k), ("h", h)):
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"masked fraction {name}: got {fraction}, need 0 to 1")
    if k == 0.0 and h == 0.0:
        return loss_mask.clone(), loss_mask.clone()
    key = _sortable_bits(std)
    valid = loss_mask.sum(dtype=torch.float64)
    agreeing = _select_lowest(key, loss_mask, torch.floor(k * valid + 1e-9).long())
    # ~key reverses the order of the keys without touching that of the indices.
    diverging = _select_lowest(~key, loss_mask, torch.floor(h * valid + 1e-9).long())
    return loss_mask & ~agreeing, loss_mask & ~diverging


def _sortable_bits(x: torch.Tensor) -> torch.Tensor:
    """Signed integers in the same order as the floats `x`; NaN above infinity, -0 equal to 0."""
    x = x.detach() + 0.0
    if x.dtype == torch.float64:
        bits = x.view(torch.int64)
        return bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    bits = x.float().view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _select_lowest(key: torch.Tensor, valid: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Mark the `count` valid positions of lowest key, equal keys in order of index.

    A radix select, 16 bits a pass from the top: linear in T, integer additions only (the same bits on
    every rank), and it never asks the host for `count`. Two stable sorts take five times as long.

    Args:
        key: i32 or i64 [T].
        valid: bool [T].
        count: i64 0-dim, 0 <= count <= number of valid positions.

    Returns:
        bool [T].
    """
    chosen = torch.zeros_like(valid)
    candidate, remaining = valid, count
    one = torch.ones(1, dtype=torch.long, device=key.device).expand(key.numel())
    top = key.element_size() * 8 - 16
    for shift in range(top, -1, -16):
        digit = (key >> shift).bitwise_and_(0xFFFF)
        if shift == top:
            digit ^= 0x8000  # the sign bit: negative keys come first
        bucket = torch.where(candidate, digit, 0x10000).int()
        histogram = torch.zeros(0x10001, dtype=torch.long, device=key.device).index_add_(0, bucket, one)
        up_to = histogram[:0x10000].cumsum(0)
        pivot = torch.searchsorted(up_to, remaining)  # 0-dim: `take` below, since indexing would ask the host for it
        chosen |= candidate & (digit < pivot)
        remaining = remaining - (up_to.take(pivot) - histogram.take(pivot))
        candidate = candidate & (digit == pivot)
    return chosen | (candidate & (candidate.cumsum(0, dtype=torch.int32) <= remaining))


def _keys(group_ids: torch.Tensor, occurrence: torch.Tensor, seed: int, step: int) -> torch.Tensor:
    """A 64-bit hash of (seed, step, group id, occurrence) for each trajectory, i64 [N]."""
    key = torch.full_like(group_ids, _signed(seed))
    for part in (_signed(step), group_ids, occurrence):
        key = _mix(key) ^ part
    return _mix(key)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The splitmix64 step (Steele et al., 2014) in wrapping int64 arithmetic."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _shift_right(x: torch.Tensor, by: int) -> torch.Tensor:
    """Logical right shift of int64 (torch's own carries the sign)."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _signed(x: int) -> int:
    """The int64 with the same low 64 bits."""
    x &= 0xFFFFFFFFFFFFFFFF
    return x - (1 << 64) if x >= 1 << 63 else x
