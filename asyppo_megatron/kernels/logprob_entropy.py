"""Logprob and entropy of a vocabulary-parallel softmax in Triton: two reads and one write of the logits in all.

Importing this module needs Triton; `kernels.policy` imports it only where it is there. The plain-torch reference
is `ppo.logprob`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from asyppo_megatron.kernels.softmax import backward_rows, forward_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _LogprobEntropy(torch.autograd.Function):
    """Saves the logits themselves and 12 bytes a token; one all-gather over `tp_group`, forward only."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        labels: torch.Tensor,
        temperature: float,
        vocab_start: int,
        num_valid: int,
        tp_group: Any,
        inplace: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        labels = labels.contiguous()
        results, saved = forward_rows(logits.detach(), labels, temperature, vocab_start, num_valid, tp_group)
        ctx.save_for_backward(logits, labels, saved)
        ctx.arguments = (temperature, vocab_start, num_valid)
        ctx.inplace, ctx.overwritten = inplace, False
        return results[0], results[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: torch.Tensor, grad_entropies: torch.Tensor) -> Any:
        logits, labels, saved = ctx.saved_tensors
        if ctx.overwritten:
            raise RuntimeError("logprob_entropy: second backward, but the first overwrote the logits (inplace)")
        ctx.overwritten = ctx.inplace
        x = logits.detach()
        grad = x if ctx.inplace else torch.empty_like(x)
        backward_rows(x, labels, saved, grad_logprobs, grad_entropies, grad, *ctx.arguments)
        return grad, None, None, None, None, None, None


def logprob_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    temperature: float = 1.0,
    vocab_start: int = 0,
    num_valid: int | None = None,
    tp_group: Any = None,
    inplace: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax(logits / temperature)[label] and the softmax's exact entropy, over the full vocabulary.

    Args:
        logits: [T, Vp], this rank's shard of the vocabulary; f32, bf16 or f16, computed in f32.
        labels: i64 [T], global token ids; the same on every rank of `tp_group`.
        temperature: > 0.
        vocab_start: global id of this shard's first column.
        num_valid: valid columns of this shard; those behind pad the vocabulary and are excluded.
        tp_group: group over which the vocabulary is split; None when it is not.
        inplace: backward may write the gradient over the logits (once), so nothing else may have saved them.

    Returns:
        logprobs f32 [T] and entropies f32 [T], nats. Rows whose gradients are both zero send back zeros without
        being read, whatever they hold.
    """
    if logits.dtype not in DTYPES:
        raise ValueError(f"logits: got {logits.dtype}, need float32, bfloat16 or float16; ppo.logprob takes float64")
    if not temperature > 0.0:
        raise ValueError(f"temperature: got {temperature}, need more than 0")
    valid = logits.size(-1) if num_valid is None else num_valid
    x = logits if logits.stride(-1) == 1 else logits.contiguous()
    return _LogprobEntropy.apply(x, labels, temperature, vocab_start, valid, tp_group, inplace)
