"""The operators in plain torch, as `ppo/` has them, behind the signatures of the kernels; needs no Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from asyppo_megatron.ppo import losses
from asyppo_megatron.ppo.kl import MAX_LOG_RATIO
from asyppo_megatron.ppo.logprob import logprob_entropy
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


class Settings(NamedTuple):
    """What does not change from token to token; the clip ranges may."""

    kind: str
    entropy_coef: float
    clip_low: Bound
    clip_high: Bound
    dual_clip: float | None


def check_settings(settings: Settings, has_entropies: bool) -> None:
    """A ValueError for what the kernels of the separable losses cannot compute."""
    if settings.kind not in SEPARABLE:
        kinds = ", ".join(SEPARABLE)
        raise ValueError(f"policy loss kernel: got {settings.kind!r}, need one of {kinds}; ppo.losses has the rest")
    if settings.entropy_coef != 0.0 and not has_entropies:
        raise ValueError(f"entropies: got None, need f32 [T] with entropy_coef {settings.entropy_coef}")
    if settings.kind == "ppo" and settings.dual_clip is not None and settings.dual_clip <= 1.0:
        raise ValueError(f"dual_clip: got {settings.dual_clip}, need more than 1 (3 is usual) or None")


class Tokens(NamedTuple):
    """What a separable policy loss knows about each token, [n] each; the clip ranges may be numbers."""

    labels: torch.Tensor
    old_logprobs: torch.Tensor
    advantages: torch.Tensor
    loss_mask: torch.Tensor
    advantage_mask: torch.Tensor
    entropy_mask: torch.Tensor
    weights: torch.Tensor
    clip_low: Bound
    clip_high: Bound

    def cut(self, part: slice) -> Tokens:
        return Tokens(*(x[part] if isinstance(x, torch.Tensor) else x for x in self))


class Head(NamedTuple):
    """How hidden states become probabilities, and how many tokens' logits there are at a time.

    Attributes:
        temperature: > 0.
        vocab_start: global id of this shard's first row of the weight.
        num_valid: valid rows of this shard of the weight; those behind pad the vocabulary.
        tp_group: group over which the vocabulary is split, or None.
        chunk: tokens of a chunk.
        fp32_logits: compute a chunk's logits in f32, whatever the weight is stored in.
        sequence_parallel: each rank of `tp_group` has its part of the tokens' hidden states.
    """

    temperature: float
    vocab_start: int
    num_valid: int
    tp_group: Any
    chunk: int
    fp32_logits: bool
    sequence_parallel: bool = False

    def logits(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """[n, Vp] of one chunk."""
        if not self.fp32_logits or weight.dtype in (torch.float32, torch.float64):
            return hidden @ weight.t()
        if hidden.is_cuda:
            return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        return hidden.float() @ weight.float().t()


class Implementation(NamedTuple):
    """What `linear_head` does to a chunk's logits [n, Vp], which it may overwrite.

    Attributes:
        scores: (logits, labels, head) -> logprobs and entropies [2, n].
        loss: (logits, tokens, settings, head, wants_gradient) -> (logprobs and entropies [2, n]; loss and `METRICS`
            summed over the chunk, f64 [1 + metrics]; gradient of the logits [n, Vp], None where it is not wanted).
    """

    scores: Callable[..., torch.Tensor]
    loss: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]


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
    negative_scale: float = 0.5,
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
        negative_scale=negative_scale,
    )
    found = _metrics(
        logprobs,
        entropies,
        Tokens(
            logprobs,
            old_logprobs,
            advantages,
            loss_mask,
            loss_mask if advantage_mask is None else advantage_mask,
            loss_mask if entropy_mask is None else entropy_mask,
            advantages,
            clip_low,
            clip_high,
        ),
    )
    return PolicyLoss(total, count, found)


@torch.no_grad()
def _metrics(logprobs: torch.Tensor, entropies: torch.Tensor | None, tokens: Tokens) -> dict[str, torch.Tensor]:
    """`METRICS` of some tokens, f64 0-dim each."""
    mask = tokens.loss_mask
    difference = zero_outside(logprobs, mask) - zero_outside(tokens.old_logprobs, mask)
    log_ratio = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    sign = zero_outside(tokens.advantages, mask).sign()
    beyond_clip = (ratio - clip(ratio, tokens.clip_low, tokens.clip_high)) * sign > 0
    values = {
        "tokens": mask,
        "advantage_tokens": mask & tokens.advantage_mask,
        "entropy_tokens": mask & tokens.entropy_mask,
        "clipped": mask & beyond_clip,
        "kl": torch.expm1(log_ratio.double()) - log_ratio,
        "entropy": zero_outside(torch.zeros_like(ratio) if entropies is None else entropies, mask),
        "ratio": zero_outside(ratio, mask),
        "beyond": difference.abs() > MAX_LOG_RATIO,
    }
    if entropies is None:
        values["entropy_tokens"] = torch.zeros_like(mask)
    return {name: values[name].sum(dtype=torch.float64) for name in METRICS}


def _chunk_scores(logits: torch.Tensor, labels: torch.Tensor, head: Head) -> torch.Tensor:
    return torch.stack(
        logprob_entropy(
            logits,
            labels,
            temperature=head.temperature,
            vocab_start=head.vocab_start,
            num_valid=head.num_valid,
            tp_group=head.tp_group,
            inplace=True,
        )
    )


def _chunk_loss(
    logits: torch.Tensor, tokens: Tokens, settings: Settings, head: Head, wants_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`Implementation.loss` by autograd through `ppo/`, on one chunk."""
    leaf = logits.detach().requires_grad_(wants_gradient)
    with torch.enable_grad():
        results = _chunk_scores(leaf, tokens.labels, head)
        logprobs, entropies = results.unbind()
        loss = losses.policy_token_loss(
            logprobs,
            tokens.old_logprobs,
            tokens.advantages,
            kind=settings.kind,
            clip_low=tokens.clip_low,
            clip_high=tokens.clip_high,
            dual_clip=settings.dual_clip,
            loss_mask=tokens.loss_mask,
        )
        loss = zero_outside(loss, tokens.advantage_mask)
        if settings.entropy_coef != 0.0:
            counted = tokens.loss_mask & tokens.entropy_mask
            loss = loss - settings.entropy_coef * zero_outside(entropies, counted, loss.dtype)
        total = (loss * tokens.weights).sum()
    grad = torch.autograd.grad(total, leaf)[0] if wants_gradient else None
    metrics = _metrics(logprobs, entropies, tokens)
    sums = torch.stack([total.detach().double(), *metrics.values()])
    return results.detach(), sums, grad


IMPLEMENTATION = Implementation(_chunk_scores, _chunk_loss)
