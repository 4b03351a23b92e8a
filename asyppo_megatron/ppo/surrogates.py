"""The token losses of the family, given a clean log-ratio: the kinds behind `losses.policy_token_loss`.

All inputs are [T], 0 outside the loss mask, so every result is 0 there.
"""

from __future__ import annotations

import torch

from asyppo_megatron.ppo.segments import segment_sum, token_counts, token_sequences, zero_outside

# Bound of ASPO's soft dual clip, on the ratio and on its inverse (from the authors' code).
ASPO_DUAL_CLIP = 3.0
# ASymPO leaves a response alone whose mean negative log-probability is below this.
ASYMPO_MIN_NLL = 1e-8

# A clip range: one number, or f32 [T].
Bound = float | torch.Tensor


def clip(ratio: torch.Tensor, clip_low: Bound, clip_high: Bound) -> torch.Tensor:
    """clip(r, 1 - clip_low, 1 + clip_high); two calls, since `clamp` takes no number beside a tensor."""
    return ratio.clamp(min=1.0 - clip_low).clamp(max=1.0 + clip_high)


def clipped_surrogate(
    ratio: torch.Tensor, advantage: torch.Tensor, clip_low: Bound, clip_high: Bound, dual_clip: float | None
) -> torch.Tensor:
    """PPO's clipped loss (arXiv 1707.06347, Eq. 7), optionally bounded for negative advantages."""
    loss = -torch.minimum(ratio * advantage, clip(ratio, clip_low, clip_high) * advantage)
    if dual_clip is None:
        return loss
    if dual_clip <= 1.0:
        raise ValueError(f"dual_clip: got {dual_clip}, need more than 1 (3 is usual) or None")
    return torch.where(advantage < 0, torch.minimum(loss, -dual_clip * advantage), loss)


def cispo(
    logprobs: torch.Tensor, log_ratio: torch.Tensor, advantage: torch.Tensor, clip_low: Bound, clip_high: Bound
) -> torch.Tensor:
    """CISPO (arXiv 2506.13585): REINFORCE weighted by a clipped ratio, so that no token loses its gradient."""
    return -clip(log_ratio.exp(), clip_low, clip_high).detach() * advantage * logprobs


def aspo(
    logprobs: torch.Tensor, log_ratio: torch.Tensor, advantage: torch.Tensor, clip_low: Bound, clip_high: Bound
) -> torch.Tensor:
    """ASPO (arXiv 2510.06062): the weight of positive advantages is inverted, with a soft dual clip at 3.

        A < 0:   -max(r, 1 - clip_low) A,     where r > 3:    -3 A logprob
        A >= 0:  -r / sg(r)^2 A,              where 1/r > 3:  -3 A logprob,   0 where r > 1 + clip_high

    The soft branches keep a gradient of bounded weight; only their gradients mean anything.
    """
    ratio = log_ratio.exp()
    floor = 1.0 - clip_low
    soft = -ASPO_DUAL_CLIP * advantage * logprobs
    # r / sg(r)^2: the value 1/r, the gradient (1/r) dlogprob.
    inverse = (-log_ratio).exp().detach()
    flipped = ratio * inverse.square()
    negative = -torch.where(ratio > floor, ratio, floor) * advantage
    negative = torch.where(ratio > ASPO_DUAL_CLIP, soft, negative)
    positive = torch.where(inverse > ASPO_DUAL_CLIP, soft, -flipped * advantage)
    positive = torch.where(ratio > 1.0 + clip_high, 0.0, positive)
    return torch.where(advantage < 0, negative, positive)


def asympo(
    logprobs: torch.Tensor, advantage: torch.Tensor, mask: torch.Tensor, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    """ASymPO: each response's NLL scaled to 1 by its own value under the current policy.

    Averaged over the tokens of response i this is A_i nll_i / sg(nll_i): with zero-sum advantages the loss
    is 0, its gradient is not. A response whose nll is below 1e-8 is left unscaled. Reconstructed from
    the abstract of the paper, which is all that was public: details may differ from the authors'.
    """
    nll = sequence_mean(-logprobs, mask, cu_seqlens).detach()
    scale = torch.where(nll < ASYMPO_MIN_NLL, torch.ones_like(nll), nll)
    return -advantage * logprobs / scale


def spo(logprobs: torch.Tensor, advantage: torch.Tensor, negative_scale: float) -> torch.Tensor:
    """SPO, ASymPO's baseline: a fixed smaller scale for negative advantages.

    Averaged over the tokens of response i this is w_i A_i nll_i. Reconstructed from the abstract of the
    ASymPO paper, which is all that was public: details, the scale included, may differ from the authors'.
    """
    return -torch.where(advantage < 0, negative_scale * advantage, advantage) * logprobs


def sequence_mean(x: torch.Tensor, mask: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Mean of `x` (0 outside `mask`) over each sequence's trainable tokens, at every one of them, [T]."""
    sequences = token_sequences(mask, cu_seqlens)
    counts = token_counts(mask, cu_seqlens)
    means = segment_sum(x, sequences, counts.numel()) / counts.clamp(min=1)
    return zero_outside(means[sequences], mask)
