"""The LM head and the policy loss without the logits of more than one chunk of tokens; needs no Triton.

Given (logprob, entropy) the loss is a sum over tokens, so a chunk's logits, loss and both weight and hidden gradients
are found while the chunk is there: three matrix products, nothing recomputed. What happens between the products comes
from an `Implementation`: `linear_policy_loss` has the kernels', `reference` that of plain torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from asyppo_megatron.kernels.reference import IMPLEMENTATION as REFERENCE
from asyppo_megatron.kernels.reference import METRICS, Head, Implementation, Settings, Tokens, check_settings
from asyppo_megatron.kernels.reference import token_weights as weights_of
from asyppo_megatron.ppo.segments import working_dtype, zero_outside
from asyppo_megatron.ppo.surrogates import Bound

CHUNK = 1024


class LinearPolicyLoss(NamedTuple):
    """Attributes:
    sum: f32, 0-dim, differentiable by hidden and weight.
    count: i64, 0-dim; the loss is sum / count. None where the caller gave `token_weights`.
    metrics: sums over the tokens, f64 0-dim each, see `reference.METRICS`.
    logprobs: f32 [T], nats; without gradient, 0 outside the loss mask, as the entropies.
    entropies: f32 [T], nats.
    """

    sum: torch.Tensor
    count: torch.Tensor | None
    metrics: dict[str, torch.Tensor]
    logprobs: torch.Tensor
    entropies: torch.Tensor


class _Rows:
    """The hidden states of all tokens of a tensor-parallel group, a chunk at a time, and their gradient's way back.

    Under sequence parallelism each rank of the group has an equal part of the tokens; a chunk takes as many rows from
    every rank, so that the chunks' order is not that of the tokens.
    """

    def __init__(self, hidden: torch.Tensor, head: Head):
        self.hidden, self.group = hidden, head.tp_group
        self.size = 1 if head.tp_group is None else dist.get_world_size(head.tp_group)
        self.is_sharded = head.sequence_parallel and self.size > 1
        self.ranks = self.size if self.is_sharded else 1
        self.step = max(1, head.chunk // self.ranks)
        self.tokens = hidden.size(0) * self.ranks

    def ordered(self, x: torch.Tensor) -> torch.Tensor:
        """A [tokens] tensor in the order of the chunks."""
        if not self.is_sharded:
            return x
        return torch.cat([part.flatten() for part in x.view(self.ranks, -1).split(self.step, 1)])

    def restored(self, x: torch.Tensor) -> torch.Tensor:
        """A [k, tokens] tensor from the order of the chunks."""
        if not self.is_sharded:
            return x
        parts = x.split(self.step * self.ranks, 1)
        return torch.cat([part.reshape(len(x), self.ranks, -1) for part in parts], 2).flatten(1)

    def chunks(self) -> Iterator[tuple[slice, slice]]:
        """(own rows, tokens in the order of the chunks) of every chunk."""
        for start in range(0, self.hidden.size(0), self.step):
            end = min(start + self.step, self.hidden.size(0))
            yield slice(start, end), slice(start * self.ranks, end * self.ranks)

    def gather(self, own: slice) -> torch.Tensor:
        """Hidden states of a chunk; under sequence parallelism one all-gather over the tensor-parallel group."""
        rows = self.hidden[own]
        if not self.is_sharded:
            return rows
        gathered = rows.new_empty(rows.size(0) * self.ranks, rows.size(1))
        dist.all_gather_into_tensor(gathered, rows.contiguous(), group=self.group)
        return gathered

    def send_back(self, grad_logits: torch.Tensor, weight: torch.Tensor, into: torch.Tensor) -> None:
        """A chunk's gradient by this shard of the vocabulary; sharded rows get the sum over all shards."""
        if self.is_sharded:
            dist.reduce_scatter_tensor(into, grad_logits @ weight, group=self.group)
        else:
            torch.mm(grad_logits, weight, out=into)

    def finish(self, grad_hidden: torch.Tensor) -> None:
        """The sum over the shards of the vocabulary that `send_back` has left out."""
        if self.size > 1 and not self.is_sharded:
            dist.all_reduce(grad_hidden, group=self.group)


class _LinearPolicyLoss(torch.autograd.Function):
    """Saves the gradient of hidden, and of weight where there is no main_grad to add it to."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        tokens: Tokens,
        settings: Settings,
        head: Head,
        implementation: Implementation,
        main_grad: torch.Tensor | None,
        grad_scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden, weight = hidden.detach(), weight.detach()
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        rows, dtype = _Rows(hidden, head), working_dtype(hidden)
        tokens = Tokens(*(rows.ordered(x) if isinstance(x, torch.Tensor) else x for x in tokens))
        results = torch.empty(2, rows.tokens, dtype=dtype, device=hidden.device)
        sums = torch.zeros(1 + len(METRICS), dtype=torch.float64, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if of_hidden else None
        target = main_grad
        if of_weight and main_grad is None:
            target = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
        for own, part in rows.chunks():
            chunk = tokens.cut(part)
            # A dead token's gradient is zero, but zero times a NaN in its hidden state would reach the weight's.
            alive = torch.where(chunk.loss_mask[:, None], rows.gather(own), 0.0)
            logits = head.logits(alive, weight)
            results[:, part], part_sums, grad_logits = implementation.loss(
                logits, chunk, settings, head, of_hidden or of_weight
            )
            sums += part_sums
            del logits
            if grad_logits is None:
                continue
            grad_logits = grad_logits.to(weight.dtype)
            if grad_hidden is not None:
                rows.send_back(grad_logits, weight, grad_hidden[own])
            if of_weight:
                _add_product(target, grad_logits, alive, 1.0 if main_grad is None else grad_scale)
            del grad_logits
        if grad_hidden is not None:
            rows.finish(grad_hidden)
        ctx.save_for_backward(grad_hidden, None if main_grad is not None else target)
        ctx.weight, ctx.grad_scale, ctx.to_main_grad = weight, grad_scale, of_weight and main_grad is not None
        results = rows.restored(results)
        ctx.mark_non_differentiable(sums, results)
        return sums[0].to(dtype), sums, results

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


def _add_product(target: torch.Tensor, grad_logits: torch.Tensor, hidden: torch.Tensor, scale: float) -> None:
    """target += scale grad_logits^T hidden, target f32: one product that accumulates, no temporary of its size."""
    if grad_logits.dtype == target.dtype:
        target.addmm_(grad_logits.t(), hidden, alpha=scale)
    elif grad_logits.is_cuda:
        torch.addmm(target, grad_logits.t(), hidden, out_dtype=target.dtype, alpha=scale, out=target)
    else:
        target.addmm_(grad_logits.to(target.dtype).t(), hidden.to(target.dtype), alpha=scale)


def linear_policy_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
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
    token_weights: torch.Tensor | None = None,
    temperature: float = 1.0,
    vocab_start: int = 0,
    num_valid: int | None = None,
    tp_group: Any = None,
    sequence_parallel: bool = False,
    chunk: int = CHUNK,
    fp32_logits: bool = False,
    main_grad: torch.Tensor | None = None,
    grad_scale: float = 1.0,
    implementation: Implementation = REFERENCE,
) -> LinearPolicyLoss:
    """`policy_loss` of the logits hidden weight^T, of which only `chunk` rows exist at a time.

    Args:
        hidden: [T, H], all tokens on every rank of `tp_group`; under sequence parallelism [T / tp, H], this rank's.
        weight: [Vp, H], this rank's shard, of the same dtype.
        labels: i64 [T], global token ids; of all tokens, as everything per token.
        token_weights: f32 [T], what each token's loss weighs, in place of `aggregation`; `cu_seqlens` may be None then.
        sequence_parallel: hidden states are gathered, and their gradient is scattered, a chunk at a time.
        main_grad: f32 [Vp, H]; forward adds grad_scale x the weight's gradient to it, backward then returns zeros for
            the weight. None: the gradient goes the usual way.
        grad_scale: what backward will be given as the gradient of `sum`; backward checks it. Only with `main_grad`.
        implementation: of what happens to a chunk's logits.

    The others are those of `ppo.losses.policy_loss` and `ppo.logprob.logprob_entropy`.
    """
    settings = Settings(kind, entropy_coef, clip_low, clip_high, dual_clip)
    check_settings(settings, True)
    if chunk < 1:
        raise ValueError(f"chunk: got {chunk}, need at least one token")
    count = None
    if token_weights is None:
        if cu_seqlens is None:
            raise ValueError("cu_seqlens: got None, need i32 [N + 1], or token_weights")
        token_weights, count = weights_of(loss_mask, cu_seqlens, aggregation, length_norm)
    masks = [loss_mask if mask is None else mask for mask in (None, advantage_mask, entropy_mask)]
    valid = weight.size(0) if num_valid is None else num_valid
    head = Head(temperature, vocab_start, valid, tp_group, chunk, fp32_logits, sequence_parallel)
    total, sums, results = _LinearPolicyLoss.apply(
        hidden,
        weight,
        Tokens(labels.contiguous(), old_logprobs, advantages, *masks, token_weights, clip_low, clip_high),
        settings,
        head,
        implementation,
        main_grad,
        grad_scale,
    )
    metrics = dict(zip(METRICS, sums[1:].unbind(), strict=True))
    return LinearPolicyLoss(total, count, metrics, *zero_outside(results, loss_mask).unbind())


@torch.no_grad()
def linear_logprob_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    head: Head,
    *,
    implementation: Implementation = REFERENCE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logprobs and entropies, f32 [T] each, without gradient and without the logits: for old logprobs."""
    rows = _Rows(hidden, head)
    labels = rows.ordered(labels.contiguous())
    results = torch.empty(2, rows.tokens, dtype=working_dtype(hidden), device=hidden.device)
    for own, part in rows.chunks():
        results[:, part] = implementation.scores(head.logits(rows.gather(own), weight), labels[part], head)
    logprobs, entropies = rows.restored(results).unbind()
    return logprobs, entropies
