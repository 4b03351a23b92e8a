"""Policy, value and KL losses on packed `[T]` tensors.

Every loss returns `(sum, count)`; the loss is sum / count, 0 where count is 0. Both add up over micro-batches
and data-parallel ranks, so one division by the global count gives the loss, and the gradient, of the
whole mini-batch, however it was cut. Reductions are in float32 (float64 for float64 inputs).
"""

from __future__ import annotations

import torch

from asyppo_megatron.ppo import surrogates
from asyppo_megatron.ppo.kl import MAX_LOG_RATIO, kl_estimate
from asyppo_megatron.ppo.segments import token_counts, token_sequences, working_dtype, zero_outside

POLICY_KINDS = ("ppo", "gspo", "cispo", "aspo", "asympo", "spo")
AGGREGATIONS = ("seq-mean-token-mean", "token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")


def policy_loss(
    logprobs: torch.Tensor,
    entropies: torch.Tensor | None,
    old_logprobs: torch.Tensor | None,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    kind: str = "ppo",
    advantage_mask: torch.Tensor | None = None,
    entropy_mask: torch.Tensor | None = None,
    entropy_coef: float = 0.0,
    clip_low: surrogates.Bound = 0.2,
    clip_high: surrogates.Bound = 0.2,
    dual_clip: float | None = None,
    aggregation: str = "seq-mean-token-mean",
    length_norm: float | None = None,
    negative_scale: float = 0.5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reconstructed policy loss of AsyPPO (arXiv 2510.01656, Eq. 5), minimised.

        l_t = I_A,t policy_token_loss_t - beta I_H,t H_t

    aggregated over tokens and responses. Masked tokens stay in the denominator.

    Args:
        logprobs: f32 [T], nats, of the current policy.
        entropies: f32 [T], nats, over the full vocabulary; may be None when `entropy_coef` is 0.
        old_logprobs: f32 [T], nats; not used by "asympo" and "spo", may be None there.
        advantages: f32 [T].
        loss_mask: bool [T].
        cu_seqlens: i32 [N + 1].
        kind: see `policy_token_loss`, as for `clip_low`, `clip_high`, `dual_clip` and `negative_scale`.
        advantage_mask: bool [T], I_A, true where the advantage counts; everywhere by default.
        entropy_mask: bool [T], I_H, true where the entropy counts; everywhere by default.
        entropy_coef: beta.
        aggregation: see `aggregate`, as for `length_norm`.

    Returns:
        sum: f32, 0-dim.
        count: i64, 0-dim.
    """
    loss = policy_token_loss(
        logprobs,
        old_logprobs,
        advantages,
        kind=kind,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        loss_mask=loss_mask,
        cu_seqlens=cu_seqlens,
        negative_scale=negative_scale,
    )
    if advantage_mask is not None:
        loss = zero_outside(loss, advantage_mask)
    if entropy_coef != 0.0:
        if entropies is None:
            raise ValueError(f"entropies: got None, need f32 [T] with entropy_coef {entropy_coef}")
        counted = loss_mask if entropy_mask is None else loss_mask & entropy_mask
        loss = loss - entropy_coef * zero_outside(entropies, counted, loss.dtype)
    return aggregate(loss, loss_mask, cu_seqlens, aggregation, length_norm)


def policy_token_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor | None,
    advantages: torch.Tensor,
    *,
    kind: str = "ppo",
    clip_low: surrogates.Bound,
    clip_high: surrogates.Bound,
    dual_clip: float | None = None,
    loss_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    negative_scale: float = 0.5,
) -> torch.Tensor:
    """The policy loss of every token, to be minimised.

    With r = exp(logprob - old_logprob), the exponent held within +-20, and sg() the stop-gradient:

        ppo     -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A); with `dual_clip` c at most -c A where A < 0
        gspo    the same with the sequence ratio exp(mean_t (logprob - old_logprob))      (arXiv 2507.18071)
        cispo   -sg(clip(r, 1 - clip_low, 1 + clip_high)) A logprob                      (arXiv 2506.13585)
        aspo    ppo with the ratio of positive advantages inverted                       (see `surrogates.aspo`)
        asympo  -A logprob / sg(nll), nll the response's mean token NLL                  (see `surrogates.asympo`)
        spo     -w A logprob, w = 1 where A >= 0, else `negative_scale`                  (see `surrogates.spo`)

    Args:
        logprobs: f32 [T], nats, of the current policy.
        old_logprobs: f32 [T], nats; may be None for "asympo" and "spo".
        advantages: f32 [T].
        kind: one of the above.
        clip_low: lower clip range, a number or f32 [T]; 1 means no lower bound.
        clip_high: upper clip range, a number or f32 [T].
        dual_clip: c > 1 of "ppo" and "gspo" (arXiv 1912.09729), or None.
        loss_mask: bool [T]; everywhere by default.
        cu_seqlens: i32 [N + 1]; needed by "gspo" and "asympo".
        negative_scale: w of "spo" for negative advantages.

    Returns:
        f32 [T], 0 outside `loss_mask`.
    """
    if kind not in POLICY_KINDS:
        raise ValueError(f"policy loss: got {kind!r}, need one of {', '.join(POLICY_KINDS)}")
    mask = torch.ones_like(logprobs, dtype=torch.bool) if loss_mask is None else loss_mask
    dtype = working_dtype(logprobs, old_logprobs, advantages)
    new = zero_outside(logprobs, mask, dtype)
    advantage = zero_outside(advantages, mask, dtype)
    if kind == "asympo":
        return surrogates.asympo(new, advantage, mask, _needed(cu_seqlens, "cu_seqlens", kind))
    if kind == "spo":
        return surrogates.spo(new, advantage, negative_scale)
    log_ratio = new - zero_outside(_needed(old_logprobs, "old_logprobs", kind), mask, dtype)
    if kind == "gspo":
        log_ratio = surrogates.sequence_mean(log_ratio, mask, _needed(cu_seqlens, "cu_seqlens", kind))
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if kind == "cispo":
        return surrogates.cispo(new, log_ratio, advantage, clip_low, clip_high)
    if kind == "aspo":
        return surrogates.aspo(new, log_ratio, advantage, clip_low, clip_high)
    return surrogates.clipped_surrogate(log_ratio.exp(), advantage, clip_low, clip_high, dual_clip)


def _needed(x: torch.Tensor | None, name: str, kind: str) -> torch.Tensor:
    """`x`, or a ValueError where the caller left out what this kind of loss is made of."""
    if x is None:
        raise ValueError(f"policy loss {kind}: got no {name}, need {name}")
    return x


def aggregate(
    token_losses: torch.Tensor,
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    aggregation: str,
    length_norm: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reduce token losses to (sum, count), both additive over any cut into whole sequences.

        seq-mean-token-mean      mean over the tokens of a response, then over responses (Eq. 1)
        token-mean               mean over all tokens (Algorithm 1 calls the whole batch O: its other reading)
        seq-mean-token-sum       sum over the tokens of a response, mean over responses
        seq-mean-token-sum-norm  the same divided by the constant `length_norm` (Dr. GRPO)

    A response without a trainable token counts nowhere.

    Args:
        token_losses: f32 [T], 0 outside `loss_mask`.
        loss_mask: bool [T].
        cu_seqlens: i32 [N + 1].
        aggregation: one of the above.
        length_norm: tokens, of "seq-mean-token-sum-norm".

    Returns:
        sum: f32, 0-dim.
        count: i64, 0-dim: tokens for "token-mean", else responses.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation: got {aggregation!r}, need one of {', '.join(AGGREGATIONS)}")
    if aggregation == "token-mean":
        return token_losses.sum(), loss_mask.sum()
    counts = token_counts(loss_mask, cu_seqlens)
    if aggregation == "seq-mean-token-mean":
        sequences = token_sequences(loss_mask, cu_seqlens)
        token_losses = token_losses / counts.clamp(min=1)[sequences]
    if aggregation == "seq-mean-token-sum-norm":
        if length_norm is None or length_norm <= 0:
            raise ValueError(f"length_norm: got {length_norm}, need the longest response in tokens")
        token_losses = token_losses / length_norm
    return token_losses.sum(), (counts > 0).sum()


def high_entropy_clip(
    entropies: torch.Tensor,
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    clip: float = 0.2,
    high_entropy: float = 0.4,
    fraction: float = 0.2,
) -> torch.Tensor:
    """ASPO's clip range (arXiv 2510.06062): wider for the highest-entropy tokens of each response.

    These are floor(fraction n) of its n tokens.

    Args:
        entropies: f32 [T], nats.
        loss_mask: bool [T].
        cu_seqlens: i32 [N + 1].
        clip: range of the other tokens.
        high_entropy: range of the highest-entropy tokens.
        fraction: of each response's trainable tokens; equal entropies: the lower index is taken first.

    Returns:
        f32 [T], to be `clip_low` and `clip_high`.
    """
    sequences = token_sequences(loss_mask, cu_seqlens)
    outside_last = torch.where(loss_mask, entropies.detach(), -torch.inf)
    order = torch.argsort(outside_last, descending=True, stable=True)
    order = order[torch.argsort(sequences[order], stable=True)]
    start = cu_seqlens.to(loss_mask.device, torch.long, non_blocking=True)[:-1]
    rank = torch.arange(order.numel(), device=order.device) - start[sequences]
    wide = torch.floor(fraction * token_counts(loss_mask, cu_seqlens).double() + 1e-9)[sequences]
    result = torch.full_like(entropies, clip, dtype=working_dtype(entropies)).masked_fill_(rank < wide, high_entropy)
    return torch.empty_like(result).index_copy_(0, order, result)


def value_loss(
    values: torch.Tensor,
    returns: torch.Tensor,
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    trajectories: torch.Tensor | None = None,
    value_clip: float | None = None,
    old_values: torch.Tensor | None = None,
    aggregation: str = "token-mean",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of one mini-critic on its share (arXiv 2510.01656, Eq. 2): (V_t - R_t)^2, factor 1.

    With `value_clip` c: max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2).

    Args:
        values: f32 [T].
        returns: f32 [T].
        loss_mask: bool [T].
        cu_seqlens: i32 [N + 1].
        trajectories: bool [N], the critic's share; all by default. None selected gives (0, 0).
        value_clip: c, or None for no clipping.
        old_values: f32 [T], needed with `value_clip`.
        aggregation: see `aggregate`; not "seq-mean-token-sum-norm".

    Returns:
        sum: f32, 0-dim.
        count: i64, 0-dim.
    """
    mask = loss_mask
    if trajectories is not None:
        chosen = trajectories.to(loss_mask.device, non_blocking=True)
        mask = loss_mask & chosen[token_sequences(loss_mask, cu_seqlens)]
    dtype = working_dtype(values, returns)
    value, target = zero_outside(values, mask, dtype), zero_outside(returns, mask, dtype)
    loss = (value - target).square()
    if value_clip is not None:
        if old_values is None:
            raise ValueError(f"old_values: got None, need f32 [T] with value_clip {value_clip}")
        old = zero_outside(old_values, mask, dtype)
        clipped = old + (value - old).clamp(-value_clip, value_clip)
        loss = torch.maximum(loss, (clipped - target).square())
    return aggregate(loss, mask, cu_seqlens, aggregation)


def kl_loss(
    logprobs: torch.Tensor,
    reference_logprobs: torch.Tensor,
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    kind: str = "k3",
    aggregation: str = "seq-mean-token-mean",
    length_norm: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(policy || reference) as a loss term; the caller scales it and adds it to the policy loss.

    Args:
        logprobs: f32 [T], nats, of the current policy.
        reference_logprobs: f32 [T], nats.
        loss_mask: bool [T].
        cu_seqlens: i32 [N + 1].
        kind: estimator, see `kl.kl_estimate`.
        aggregation: see `aggregate`, as for `length_norm`; that of the policy loss.

    Returns:
        sum: f32, 0-dim.
        count: i64, 0-dim.
    """
    dtype = working_dtype(logprobs, reference_logprobs)
    new = zero_outside(logprobs, loss_mask, dtype)
    reference = zero_outside(reference_logprobs, loss_mask, dtype)
    return aggregate(kl_estimate(new, reference, kind), loss_mask, cu_seqlens, aggregation, length_norm)


def positive_nll_loss(
    logprobs: torch.Tensor, positive: torch.Tensor, loss_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """VAPO's positive-example language-model loss (arXiv 2504.05118), to be minimised.

        L = -(sum over responses i of positive reward, over t of logprob_i,t) / (their number of tokens)

    The caller scales it (mu = 0.1 in the paper) and adds it to the policy loss.

    Args:
        logprobs: f32 [T], nats, of the current policy.
        positive: bool [T], true at every position of a response whose reward is positive.
        loss_mask: bool [T].

    Returns:
        sum: f32, 0-dim.
        count: i64, 0-dim: trainable tokens of positive responses.
    """
    counted = loss_mask & positive
    return -zero_outside(logprobs, counted, working_dtype(logprobs)).sum(), counted.sum()
