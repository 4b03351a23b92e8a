"""The masked policy loss, both its gradients and every metric of its tokens in one pass, in Triton.

For the kinds whose tokens are independent of each other given (logprob, entropy); the others need sums over a
response and stay with `ppo.losses`. Importing this module needs Triton.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from asyppo_megatron.kernels.reference import METRICS, PolicyLoss, Settings, check_settings, token_weights
from asyppo_megatron.ppo.kl import MAX_LOG_RATIO
from asyppo_megatron.ppo.surrogates import ASPO_DUAL_CLIP, Bound

BLOCK = 1024
# The loss and the metrics, in the order in which the kernel stores its partial sums.
SUMS = tl.constexpr(1 + len(METRICS))
KINDS = {"ppo": 0, "cispo": 1, "aspo": 2}
PPO = tl.constexpr(KINDS["ppo"])
CISPO = tl.constexpr(KINDS["cispo"])
SOFT = tl.constexpr(ASPO_DUAL_CLIP)
LIMIT = tl.constexpr(MAX_LOG_RATIO)


@triton.jit
def _ppo(ratio, low, high, advantage, dual_clip, DUAL: tl.constexpr):
    """(loss, its derivative by the log-ratio) of the clipped surrogate."""
    free = ratio * advantage
    # Selects instead of minimum and maximum: those would drop a NaN.
    held = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio)) * advantage
    clipped = held < free
    loss = -tl.where(clipped, held, free)
    slope = tl.where(clipped, 0.0, -free)
    if DUAL:
        bounded = (advantage < 0.0) & (-dual_clip * advantage < loss)
        loss = tl.where(bounded, -dual_clip * advantage, loss)
        slope = tl.where(bounded, 0.0, slope)
    return loss, slope


@triton.jit
def _aspo(logprob, log_ratio, ratio, low, high, advantage):
    """(loss, its derivative by the log-ratio, by the logprob alone) of `ppo.surrogates.aspo`."""
    inverse = tl.exp(-log_ratio)
    negative = advantage < 0.0
    soft = tl.where(negative, ratio > SOFT, (inverse > SOFT) & (ratio <= high))
    gone = (advantage >= 0.0) & (ratio > high)
    flat = negative & (ratio <= low)
    weight = tl.where(negative, tl.where(flat, low, ratio), inverse)
    loss = tl.where(soft, -SOFT * advantage * logprob, -weight * advantage)
    slope = tl.where(soft | flat | gone, 0.0, -weight * advantage)
    return tl.where(gone, 0.0, loss), slope, tl.where(soft, -SOFT * advantage, 0.0)


@triton.jit
def _k3(x, ratio):
    """exp(x) - 1 - x; by its series where the difference would be all rounding."""
    series = 1.0 / 120.0 + x * (1.0 / 720.0 + x * (1.0 / 5040.0))
    series = x * x * (0.5 + x * (1.0 / 6.0 + x * (1.0 / 24.0 + x * series)))
    return tl.where(tl.abs(x) < 0.25, series, ratio - 1.0 - x)


@triton.jit(do_not_specialize=["count"])
def policy_loss_kernel(
    logprobs,
    entropies,
    old_logprobs,
    advantages,
    loss_mask,
    advantage_mask,
    entropy_mask,
    weights,
    clip_low,
    clip_high,
    low_number,
    high_number,
    dual_clip,
    entropy_coef,
    grad_logprobs,
    grad_entropies,
    sums,
    count,
    KIND: tl.constexpr,
    DUAL: tl.constexpr,
    ENTROPY: tl.constexpr,
    LOW_IS_TENSOR: tl.constexpr,
    HIGH_IS_TENSOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of tokens; sums f32 [blocks, SUMS]: partial sums, added up in a fixed order by the caller."""
    block = tl.program_id(0).to(tl.int64)
    token = block * BLOCK + tl.arange(0, BLOCK)
    inside = token < count
    live = inside & (tl.load(loss_mask + token, mask=inside, other=0) != 0)
    # A dead token is never read, whatever it holds.
    logprob = tl.load(logprobs + token, mask=live, other=0.0).to(tl.float32)
    difference = logprob - tl.load(old_logprobs + token, mask=live, other=0.0).to(tl.float32)
    advantage = tl.load(advantages + token, mask=live, other=0.0).to(tl.float32)
    weight = tl.load(weights + token, mask=live, other=0.0)
    counts = live & (tl.load(advantage_mask + token, mask=live, other=0) != 0)
    low = 1.0 - low_number
    high = 1.0 + high_number
    if LOW_IS_TENSOR:
        low = 1.0 - tl.load(clip_low + token, mask=live, other=0.0).to(tl.float32)
    if HIGH_IS_TENSOR:
        high = 1.0 + tl.load(clip_high + token, mask=live, other=0.0).to(tl.float32)

    beyond = (difference < -LIMIT) | (difference > LIMIT)
    log_ratio = tl.where(difference < -LIMIT, -LIMIT, tl.where(difference > LIMIT, LIMIT, difference))
    ratio = tl.exp(log_ratio)
    if KIND == PPO:
        loss, slope = _ppo(ratio, low, high, advantage, dual_clip, DUAL)
        slope = tl.where(beyond, 0.0, slope)
    elif KIND == CISPO:
        slope = -tl.where(ratio < low, low, tl.where(ratio > high, high, ratio)) * advantage
        loss = slope * logprob
    else:
        loss, slope, direct = _aspo(logprob, log_ratio, ratio, low, high, advantage)
        slope = tl.where(beyond, 0.0, slope) + direct
    total = tl.where(counts, weight * loss, 0.0)
    tl.store(grad_logprobs + token, tl.where(counts, weight * slope, 0.0), mask=inside)

    entropy_tokens = tl.zeros([BLOCK], tl.float32)
    entropy = tl.zeros([BLOCK], tl.float32)
    if ENTROPY:
        entropy = tl.load(entropies + token, mask=live, other=0.0).to(tl.float32)
        bonus = live & (tl.load(entropy_mask + token, mask=live, other=0) != 0)
        entropy_tokens = bonus.to(tl.float32)
        total -= tl.where(bonus, entropy_coef * weight * entropy, 0.0)
        tl.store(grad_entropies + token, tl.where(bonus, -entropy_coef * weight, 0.0), mask=inside)

    clipped = live & (((ratio > high) & (advantage > 0.0)) | ((ratio < low) & (advantage < 0.0)))
    out = sums + block * SUMS
    tl.store(out, tl.sum(total, 0))
    tl.store(out + 1, tl.sum(live.to(tl.float32), 0))
    tl.store(out + 2, tl.sum(counts.to(tl.float32), 0))
    tl.store(out + 3, tl.sum(entropy_tokens, 0))
    tl.store(out + 4, tl.sum(clipped.to(tl.float32), 0))
    tl.store(out + 5, tl.sum(tl.where(live, _k3(log_ratio, ratio), 0.0), 0))
    tl.store(out + 6, tl.sum(entropy, 0))
    tl.store(out + 7, tl.sum(tl.where(live, ratio, 0.0), 0))
    tl.store(out + 8, tl.sum((live & beyond).to(tl.float32), 0))


def loss_and_gradients(
    logprobs: torch.Tensor,
    entropies: torch.Tensor | None,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    masks: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    weights: torch.Tensor,
    settings: Settings,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pass itself: gradients f32 [2, T] by logprob and entropy ([1, T] without entropies), sums f64 [SUMS].

    Args:
        masks: of the loss, I_A and I_H, bool [T] each.
        weights: f32 [T], see `reference.token_weights`.
    """
    count = logprobs.numel()
    grads = torch.empty(2 if entropies is not None else 1, count, dtype=torch.float32, device=logprobs.device)
    blocks = triton.cdiv(count, BLOCK)
    sums = torch.empty(blocks, 1 + len(METRICS), dtype=torch.float32, device=logprobs.device)
    low, high = settings.clip_low, settings.clip_high
    low_is_tensor, high_is_tensor = isinstance(low, torch.Tensor), isinstance(high, torch.Tensor)
    if count:
        policy_loss_kernel[(blocks,)](
            logprobs.detach().contiguous(),
            logprobs if entropies is None else entropies.detach().contiguous(),
            old_logprobs.contiguous(),
            advantages.contiguous(),
            *(mask.contiguous().view(torch.uint8) for mask in masks),
            weights.contiguous(),
            low.contiguous() if low_is_tensor else weights,
            high.contiguous() if high_is_tensor else weights,
            0.0 if low_is_tensor else float(low),
            0.0 if high_is_tensor else float(high),
            float(settings.dual_clip or 0.0),
            float(settings.entropy_coef),
            grads[0],
            grads[-1],
            sums,
            count,
            KIND=KINDS[settings.kind],
            DUAL=settings.dual_clip is not None and settings.kind == "ppo",
            ENTROPY=entropies is not None,
            LOW_IS_TENSOR=low_is_tensor,
            HIGH_IS_TENSOR=high_is_tensor,
            BLOCK=BLOCK,
            num_warps=4,
        )
    return grads, sums.sum(0, dtype=torch.float64)


class _PolicyLoss(torch.autograd.Function):
    """Both gradients are known in forward: backward is two products."""

    @staticmethod
    def forward(ctx: Any, logprobs: torch.Tensor, entropies: torch.Tensor | None, *rest: Any) -> Any:
        grads, sums = loss_and_gradients(logprobs, entropies, *rest)
        ctx.save_for_backward(grads)
        ctx.dtypes = (logprobs.dtype, None if entropies is None else entropies.dtype)
        ctx.mark_non_differentiable(sums)
        return sums[0].float(), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: torch.Tensor, _: torch.Tensor) -> Any:
        (grads,) = ctx.saved_tensors
        scaled = grads * grad_sum
        of_logprob, of_entropy = ctx.dtypes
        to_entropies = None if of_entropy is None else scaled[1].to(of_entropy)
        return scaled[0].to(of_logprob), to_entropies, None, None, None, None, None


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
    """`ppo.losses.policy_loss` and the metrics of its tokens; arguments as there, f32, never a wait for the device.

    `kind` is "ppo", "cispo" or "aspo". `entropies` given with `entropy_coef` 0 enter the metrics alone.
    """
    settings = Settings(kind, entropy_coef, clip_low, clip_high, dual_clip)
    check_settings(settings, entropies is not None)
    weights, count = token_weights(loss_mask, cu_seqlens, aggregation, length_norm)
    masks = (
        loss_mask,
        loss_mask if advantage_mask is None else advantage_mask,
        loss_mask if entropy_mask is None else entropy_mask,
    )
    total, sums = _PolicyLoss.apply(logprobs, entropies, old_logprobs, advantages, masks, weights, settings)
    return PolicyLoss(total, count, dict(zip(METRICS, sums[1:].unbind(), strict=True)))
