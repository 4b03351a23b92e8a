"""The LM head and the policy loss without the logits of more than one chunk of tokens.

Given (logprob, entropy) the loss is a sum over tokens, so a chunk's logits, loss and both weight and hidden gradients
are found while the chunk is there: three matrix products, nothing recomputed. Importing this module needs Triton.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from asyppo_megatron.kernels.policy_loss import Settings, check_settings, loss_and_gradients
from asyppo_megatron.kernels.reference import METRICS, token_weights
from asyppo_megatron.kernels.softmax import backward_rows, forward_rows
from asyppo_megatron.ppo.segments import zero_outside
from asyppo_megatron.ppo.surrogates import Bound

CHUNK = 1024


class Head(NamedTuple):
    """How logits become probabilities, and how many tokens' logits there are at a time.

    Attributes:
        temperature: > 0.
        vocab_start: global id of this shard's first row of the weight.
        num_valid: valid rows of this shard of the weight; those behind pad the vocabulary.
        tp_group: group over which the vocabulary is split, or None.
        chunk: tokens of a chunk.
        fp32_logits: compute a chunk's logits in f32, whatever the weight is stored in.
    """

    temperature: float
    vocab_start: int
    num_valid: int
    tp_group: Any
    chunk: int
    fp32_logits: bool

    def logits(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """[n, Vp] of one chunk."""
        if not self.fp32_logits or weight.dtype == torch.float32:
            return hidden @ weight.t()
        if hidden.is_cuda:
            return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        return hidden.float() @ weight.float().t()

    def softmax(self, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`softmax.forward_rows` of one chunk."""
        return forward_rows(logits, labels, self.temperature, self.vocab_start, self.num_valid, self.tp_group)


class LinearPolicyLoss(NamedTuple):
    """Attributes:
    sum: f32, 0-dim, differentiable by hidden and weight.
    count: i64, 0-dim; the loss is sum / count.
    metrics: sums over the tokens, f64 0-dim each, see `reference.METRICS`.
    logprobs: f32 [T], nats; without gradient, 0 outside the loss mask, as the entropies.
    entropies: f32 [T], nats.
    """

    sum: torch.Tensor
    count: torch.Tensor
    metrics: dict[str, torch.Tensor]
    logprobs: torch.Tensor
    entropies: torch.Tensor


class _LinearPolicyLoss(torch.autograd.Function):
    """Saves the gradient of hidden, and of weight where there is no main_grad to add it to."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        per_token: tuple[torch.Tensor, ...],
        settings: Settings,
        head: Head,
        main_grad: torch.Tensor | None,
        grad_scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden, weight = hidden.detach(), weight.detach()
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        results = torch.empty(2, hidden.size(0), dtype=torch.float32, device=hidden.device)
        sums = torch.zeros(1 + len(METRICS), dtype=torch.float64, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if of_hidden else None
        target = main_grad
        if of_weight and main_grad is None:
            target = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for start in range(0, hidden.size(0), head.chunk):
            part = slice(start, start + head.chunk)
            old, advantages, *masks, weights = (x[part] for x in per_token)
            # A dead token's gradient is zero, but zero times a NaN in its hidden state would reach the weight's.
            alive = torch.where(masks[0][:, None], hidden[part], 0.0)
            logits = head.logits(alive, weight)
            results[:, part], saved = head.softmax(logits, labels[part])
            part_settings = settings._replace(
                clip_low=_cut(settings.clip_low, part), clip_high=_cut(settings.clip_high, part)
            )
            grads, part_sums = loss_and_gradients(*results[:, part], old, advantages, masks, weights, part_settings)
            sums += part_sums
            if of_hidden or of_weight:
                backward_rows(
                    logits, labels[part], saved, *grads, logits, head.temperature, head.vocab_start, head.num_valid
                )
                grad_logits = logits.to(weight.dtype)
                if grad_hidden is not None:
                    torch.mm(grad_logits, weight, out=grad_hidden[part])
                if of_weight:
                    _add_product(target, grad_logits, alive, 1.0 if main_grad is None else grad_scale)
            del logits
        if grad_hidden is not None and head.tp_group is not None and dist.get_world_size(head.tp_group) > 1:
            # Every shard of the vocabulary contributes to the gradient of hidden; called by every rank of the group.
            dist.all_reduce(grad_hidden, group=head.tp_group)
        ctx.save_for_backward(grad_hidden, None if main_grad is not None else target)
        ctx.weight, ctx.grad_scale, ctx.to_main_grad = weight, grad_scale, of_weight and main_grad is not None
        ctx.mark_non_differentiable(sums, results)
        return sums[0].float(), sums, results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: torch.Tensor, _: torch.Tensor, __: torch.Tensor) -> Any:
        grad_hidden, grad_weight = ctx.saved_tensors
        if ctx.to_main_grad:
            # main_grad has the weight's gradient already, of this scale: checked on the device, without waiting for it.
            torch._assert_async((grad_sum - ctx.grad_scale).abs() <= 1e-5 * abs(ctx.grad_scale))
            grad_weight = torch.zeros((), dtype=ctx.weight.dtype, device=ctx.weight.device).expand_as(ctx.weight)
        elif grad_weight is not None:
            grad_weight = (grad_weight * grad_sum).to(ctx.weight.dtype)
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_sum.to(grad_hidden.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None, None


def _cut(bound: Bound, part: slice) -> Bound:
    """A clip range of one chunk."""
    return bound[part] if isinstance(bound, torch.Tensor) else bound


def _add_product(target: torch.Tensor, grad_logits: torch.Tensor, hidden: torch.Tensor, scale: float) -> None:
    """target += scale grad_logits^T hidden, target f32: one product that accumulates, no temporary of its size."""
    if grad_logits.dtype == target.dtype:
        target.addmm_(grad_logits.t(), hidden, alpha=scale)
    elif grad_logits.is_cuda:
        torch.addmm(target, grad_logits.t(), hidden, out_dtype=target.dtype, alpha=scale, out=target)
    else:
        target.addmm_(grad_logits.float().t(), hidden.float(), alpha=scale)


def linear_policy_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
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
    temperature: float = 1.0,
    vocab_start: int = 0,
    num_valid: int | None = None,
    tp_group: Any = None,
    chunk: int = CHUNK,
    fp32_logits: bool = False,
    main_grad: torch.Tensor | None = None,
    grad_scale: float = 1.0,
) -> LinearPolicyLoss:
    """`kernels.policy_loss` of the logits hidden weight^T, of which only `chunk` rows exist at a time.

    Args:
        hidden: [T, H], all tokens on every rank of `tp_group` (gathered, under sequence parallelism).
        weight: [Vp, H], this rank's shard, of the same dtype.
        labels: i64 [T], global token ids.
        main_grad: f32 [Vp, H]; forward adds grad_scale x the weight's gradient to it, backward then returns zeros for
            the weight. None: the gradient goes the usual way.
        grad_scale: what backward will be given as the gradient of `sum`; backward checks it. Only with `main_grad`.

    The others are those of `ppo.losses.policy_loss` and `ppo.logprob.logprob_entropy`.
    """
    settings = Settings(kind, entropy_coef, clip_low, clip_high, dual_clip)
    check_settings(settings, True)
    if chunk < 1:
        raise ValueError(f"chunk: got {chunk}, need at least one token")
    weights, count = token_weights(loss_mask, cu_seqlens, aggregation, length_norm)
    masks = [loss_mask if mask is None else mask for mask in (None, advantage_mask, entropy_mask)]
    head = Head(
        temperature, vocab_start, weight.size(0) if num_valid is None else num_valid, tp_group, chunk, fp32_logits
    )
    total, sums, results = _LinearPolicyLoss.apply(
        hidden,
        weight,
        labels.contiguous(),
        (old_logprobs, advantages, *masks, weights),
        settings,
        head,
        main_grad,
        grad_scale,
    )
    metrics = dict(zip(METRICS, sums[1:].unbind(), strict=True))
    return LinearPolicyLoss(total, count, metrics, *zero_outside(results, loss_mask).unbind())


@torch.no_grad()
def linear_logprob_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, head: Head
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logprobs and entropies, f32 [T] each, without gradient and without the logits: for old logprobs."""
    results = torch.empty(2, hidden.size(0), dtype=torch.float32, device=hidden.device)
    for start in range(0, hidden.size(0), head.chunk):
        part = slice(start, start + head.chunk)
        results[:, part] = head.softmax(head.logits(hidden[part], weight), labels[part].contiguous())[0]
    return results[0], results[1]
