"""The ensemble's corrected value, its GAE and the critics' disagreement in one pass, in Triton.

Needs no host copy of `cu_seqlens`, unlike the reference (`ppo.ensemble` and `ppo.advantages`). Importing this module
needs Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from asyppo_megatron.ppo.ensemble_gae import EnsembleGAE

BLOCK = 512
AGGREGATES = ("mean", "min")


@triton.jit
def _then(kept1, cross1, gain1, keep1, last1, kept2, cross2, gain2, keep2, last2):
    """The map (G, V) -> (kept G + cross V + gain, keep V + last) of one token after that of the one behind it."""
    return (
        kept2 * kept1,
        kept2 * cross1 + cross2 * keep1,
        kept2 * gain1 + cross2 * last1 + gain2,
        keep2 * keep1,
        keep2 * last1 + last2,
    )


@triton.jit(do_not_specialize=["num_tokens"])
def ensemble_gae_kernel(
    values,
    rewards,
    loss_mask,
    cu_seqlens,
    decays,
    bootstraps,
    advantages,
    returns,
    means,
    stds,
    num_tokens,
    CRITICS: tl.constexpr,
    MINIMUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One sequence, from its end, a block at a time; the recursion is float64 like the reference's."""
    sequence = tl.program_id(0)
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    decay = tl.load(decays + sequence)
    bootstrap = tl.load(bootstraps + sequence)
    index = tl.arange(0, BLOCK)
    following_return = tl.zeros([], tl.float64)
    following_value = tl.zeros([], tl.float64)
    for first in range(0, tl.cdiv(end - start, BLOCK) * BLOCK, BLOCK):
        position = end - 1 - first - index
        inside = position >= start
        live = inside & (tl.load(loss_mask + position, mask=inside, other=0) != 0)
        total = tl.zeros([BLOCK], tl.float32)
        lowest = tl.full([BLOCK], float("inf"), tl.float32)
        for critic in tl.static_range(CRITICS):
            one = tl.load(values + critic * num_tokens.to(tl.int64) + position, mask=live, other=0.0).to(tl.float32)
            total += one
            lowest = tl.minimum(lowest, one, propagate_nan=tl.PropagateNan.ALL)
        mean = total / CRITICS
        squares = tl.zeros([BLOCK], tl.float32)
        for critic in tl.static_range(CRITICS):
            one = tl.load(values + critic * num_tokens.to(tl.int64) + position, mask=live, other=0.0).to(tl.float32)
            squares += (one - mean) * (one - mean)
        value = mean
        if MINIMUM:
            value = lowest
        reward = tl.load(rewards + position, mask=live, other=0.0).to(tl.float64)
        # A token that does not count is the identity: the recursion steps over it.
        one64 = tl.full([BLOCK], 1.0, tl.float64)
        kept, cross, gain, keep, last = tl.associative_scan(
            (
                tl.where(live, decay * one64, one64),
                tl.where(live, bootstrap * one64, 0.0 * one64),
                reward,
                tl.where(live, 0.0 * one64, one64),
                value.to(tl.float64),
            ),
            0,
            _then,
        )
        found = kept * following_return + cross * following_value + gain
        reached = keep * following_value + last
        tl.store(advantages + position, tl.where(live, found - value, 0.0).to(tl.float32), mask=inside)
        tl.store(returns + position, tl.where(live, found, 0.0).to(tl.float32), mask=inside)
        tl.store(means + position, value, mask=inside)
        tl.store(stds + position, tl.sqrt(squares / CRITICS), mask=inside)
        final = index == BLOCK - 1
        following_return = tl.sum(tl.where(final, found, 0.0), 0)
        following_value = tl.sum(tl.where(final, reached, 0.0), 0)


def ensemble_gae(
    values: torch.Tensor,
    token_rewards: torch.Tensor,
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    gamma: float = 1.0,
    lam: float | torch.Tensor = 1.0,
    how: str = "mean",
) -> EnsembleGAE:
    """Corrected value, its GAE and the critics' disagreement (arXiv 2510.01656, Eq. 3, 4).

    With i and i + 1 consecutive trainable tokens of a sequence: G_i = r_i + gamma ((1 - lambda) V_{i+1} + lambda
    G_{i+1}), A_i = G_i - V_i, as in `ppo.advantages.gae`.

    Args:
        values: f32 [M, T], M >= 1; lower precision is computed in f32 too.
        token_rewards: f32 [T].
        loss_mask: bool [T].
        cu_seqlens: i32 [N + 1], on any device.
        gamma: discount factor.
        lam: lambda, or f32 [N], one for each sequence.
        how: "mean" or "min" over the critics.
    """
    if values.dim() != 2 or values.shape[0] == 0:
        raise ValueError(f"values: got shape {tuple(values.shape)}, need [M, T] of at least one critic")
    if how not in AGGREGATES:
        raise ValueError(f"value aggregation: got {how!r}, need mean or min")
    device, (critics, size) = values.device, values.shape
    sequences = cu_seqlens.numel() - 1
    # gamma and lambda as float64 tensors: a number would reach the kernel as f32, wrong by 1e-8 a token.
    if isinstance(lam, torch.Tensor):
        lam = lam.to(device, torch.float64, non_blocking=True)
    else:
        lam = torch.full((sequences,), float(lam), dtype=torch.float64, device=device)
    results = torch.zeros(4, size, dtype=torch.float32, device=device)
    if size and sequences:
        ensemble_gae_kernel[(sequences,)](
            values.detach().contiguous(),
            token_rewards.contiguous(),
            loss_mask.contiguous().view(torch.uint8),
            cu_seqlens.to(device, non_blocking=True).contiguous(),
            gamma * lam,
            gamma * (1.0 - lam),
            *results.unbind(),
            size,
            CRITICS=critics,
            MINIMUM=how == "min",
            BLOCK=BLOCK,
            num_warps=4,
        )
    return EnsembleGAE(*results.unbind())
