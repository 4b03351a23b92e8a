"""Logprob and entropy of a vocabulary-parallel softmax: the plain-torch reference of the kernel."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

# exp() of anything below is 0.
_ZERO_BELOW = {torch.float32: -110.0, torch.float64: -760.0}


class _LogprobEntropy(torch.autograd.Function):
    """Saves one tensor of the logits' size (the local softmax); one max and one sum over `tp_group`."""

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
        parallel = tp_group is not None and dist.get_world_size(tp_group) > 1
        x = logits.detach()[:, :num_valid]
        # fp32 whatever the logits are stored in; a float64 input stays float64.
        x = x if x.dtype in (torch.float32, torch.float64) else x.float()
        peak = x.max(-1).values if num_valid else x.new_full((x.size(0),), float("-inf"))
        if parallel:
            dist.all_reduce(peak, dist.ReduceOp.MAX, group=tp_group)
        reuse = inplace or x.dtype != logits.dtype
        z = x.sub_(peak.unsqueeze(-1)) if reuse else x - peak.unsqueeze(-1)
        z.div_(temperature)
        index = labels - vocab_start
        owned = (index >= 0) & (index < num_valid)
        index = index.clamp(0, max(num_valid - 1, 0))
        picked = z.gather(-1, index.unsqueeze(-1)).squeeze(-1).masked_fill(~owned, 0.0)
        # p log p -> 0: a logit of -inf has probability 0 and adds nothing to the entropy, where 0 x -inf would be NaN.
        p = z.clamp_(min=_ZERO_BELOW[z.dtype]).exp()
        stats = torch.stack([picked, p.sum(-1), torch.einsum("tv,tv->t", p, z)])
        if parallel:
            dist.all_reduce(stats, group=tp_group)
        picked, total, weighted = stats.unbind()
        log_total = total.log()
        entropy = log_total - weighted / total
        ctx.save_for_backward(p.div_(total.unsqueeze(-1)), index, owned, entropy)
        ctx.temperature, ctx.width, ctx.dtype = temperature, logits.size(-1), logits.dtype
        return picked - log_total, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprob: torch.Tensor, grad_entropy: torch.Tensor) -> Any:
        p, index, owned, entropy = ctx.saved_tensors
        grad = p * -grad_logprob.unsqueeze(-1)
        grad.scatter_add_(-1, index.unsqueeze(-1), (grad_logprob * owned).unsqueeze(-1))
        tiny = torch.finfo(p.dtype).tiny
        grad -= grad_entropy.unsqueeze(-1) * p * (p.clamp_min(tiny).log() + entropy.unsqueeze(-1))
        grad /= ctx.temperature
        dead = (grad_logprob == 0) & (grad_entropy == 0)  # a dead row may hold NaN: it must not leak
        grad.masked_fill_(dead.unsqueeze(-1), 0.0)
        if grad.size(-1) < ctx.width:  # padded vocabulary
            grad = torch.nn.functional.pad(grad, (0, ctx.width - grad.size(-1)))
        return grad.to(ctx.dtype), None, None, None, None, None, None


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
        logits: [T, Vp], this rank's shard of the vocabulary; f32, f64 or lower (then computed in f32).
        labels: i64 [T], global token ids; the same on every rank of `tp_group`.
        temperature: > 0.
        vocab_start: global id of this shard's first column.
        num_valid: valid columns of this shard; those behind pad the vocabulary and are excluded.
        tp_group: group over which the vocabulary is split; None when it is not.
        inplace: the logits may be overwritten, once: by forward or by backward.

    Returns:
        logprobs [T] and entropies [T], nats, f32 (f64 for f64 logits). Rows whose gradients are both zero send
        back zeros whatever they hold.
    """
    valid = logits.size(-1) if num_valid is None else num_valid
    return _LogprobEntropy.apply(logits, labels, temperature, vocab_start, valid, tp_group, inplace)
