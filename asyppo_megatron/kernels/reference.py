"""The operators in plain torch, as `ppo/` has them, behind the signatures of the kernels; needs no Triton."""

from __future__ import annotations

from typing import NamedTuple

import torch

from asyppo_megatron.ppo import losses
from asyppo_megatron.ppo.advantages import gae
from asyppo_megatron.ppo.ensemble import aggregate_values, value_std
from asyppo_megatron.ppo.kl import MAX_LOG_RATIO
from asyppo_megatron.ppo.segments import token_counts, token_sequences, zero_outside
from asyppo_megatron.ppo.surrogates import Bound, clip

# Kinds of `ppo.losses` whose tokens are independent of each other given (logprob, entropy).
SEPARABLE = ("ppo", "cispo", "aspo")

# Sums over the trainable tokens: how many there are, and with I_A, and with I_H; those whose ratio left the clip range
# in the direction of the advantage; r - 1 - log r (k3, of KL(old || new)); entropy; ratio; those with |log r| beyond
# its bound.
METRICS = ("tokens", "advantage_tokens", "entropy_tokens", "clipped", "kl", "entropy", "ratio", "beyond")


class PolicyLoss(NamedTuple):
    """Attributes:
    sum: f32, 0-dim, differentiable.
    count: i64, 0-dim; the loss is sum / count.
    metrics: sums over this call's tokens, f64 0-dim each, on the device; they add up like `sum`.
    """

    sum: torch.Tensor
    count: torch.Tensor
    metrics: dict[str, torch.Tensor]


class EnsembleGAE(NamedTuple):
    """Attributes:
    advantages: f32 [T], 0 outside the loss mask, as all of these.
    returns: f32 [T].
    mean: f32 [T], the aggregated value (Eq. 3).
    std: f32 [T], population standard deviation over the critics.
    """

    advantages: torch.Tensor
    returns: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor


def token_weights(
    loss_mask: torch.Tensor, cu_seqlens: torch.Tensor, aggregation: str, length_norm: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What one token's loss weighs in `ppo.losses.aggregate`: (f32 [T], 0 outside `loss_mask`; its count)."""
    ones = zero_outside(torch.ones(loss_mask.shape, device=loss_mask.device), loss_mask)
    if aggregation == "seq-mean-token-mean":
        counts = token_counts(loss_mask, cu_seqlens)
        return ones / counts.clamp(min=1)[token_sequences(loss_mask, cu_seqlens)], (counts > 0).sum()
    if aggregation == "seq-mean-token-sum-norm" and length_norm:
        ones = ones / length_norm
    return ones, losses.aggregate(ones, loss_mask, cu_seqlens, aggregation, length_norm)[1]


def policy_loss(
    logprobs: torch.Tensor,
    entropies: torch.Tensor | None,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    kind: str = "ppo",
    advantage_mask: torch.Tensor | None = None,
    entropy_mask: torch.Tensor | None = None,
    entropy_coef: float = 0.0,
    clip_low: Bound = 0.2,
    clip_high: Bound = 0.2,
    dual_clip: float | None = None,
    aggregation: str = "seq-mean-token-mean",
    length_norm: float | None = None,
) -> PolicyLoss:
    """`ppo.losses.policy_loss` and the metrics of its tokens, float64 for float64 inputs."""
    total, count = losses.policy_loss(
        logprobs,
        entropies,
        old_logprobs,
        advantages,
        loss_mask,
        cu_seqlens,
        kind=kind,
        advantage_mask=advantage_mask,
        entropy_mask=entropy_mask,
        entropy_coef=entropy_coef,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        aggregation=aggregation,
        length_norm=length_norm,
    )
    with torch.no_grad():
        difference = zero_outside(logprobs, loss_mask) - zero_outside(old_logprobs, loss_mask)
        log_ratio = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        ratio = log_ratio.exp()
        sign = zero_outside(advantages, loss_mask).sign()
        beyond_clip = (ratio - clip(ratio, clip_low, clip_high)) * sign > 0
        values = {
            "tokens": loss_mask,
            "advantage_tokens": loss_mask if advantage_mask is None else loss_mask & advantage_mask,
            "entropy_tokens": loss_mask if entropy_mask is None else loss_mask & entropy_mask,
            "clipped": loss_mask & beyond_clip,
            "kl": torch.expm1(log_ratio.double()) - log_ratio,
            "entropy": zero_outside(torch.zeros_like(ratio) if entropies is None else entropies, loss_mask),
            "ratio": zero_outside(ratio, loss_mask),
            "beyond": difference.abs() > MAX_LOG_RATIO,
        }
        if entropies is None:
            values["entropy_tokens"] = torch.zeros_like(loss_mask)
        metrics = {name: values[name].sum(dtype=torch.float64) for name in METRICS}
    return PolicyLoss(total, count, metrics)


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

    Args:
        values: f32 [M, T], M >= 1.
        token_rewards: f32 [T].
        loss_mask: bool [T].
        cu_seqlens: i32 [N + 1].
        gamma: discount factor.
        lam: lambda, or f32 [N], one for each sequence.
        how: "mean" or "min" over the critics.
    """
    mean = aggregate_values(values, how)
    advantages, returns = gae(token_rewards, mean, loss_mask, cu_seqlens, gamma=gamma, lam=lam)
    return EnsembleGAE(advantages, returns, zero_outside(mean, loss_mask), zero_outside(value_std(values), loss_mask))
