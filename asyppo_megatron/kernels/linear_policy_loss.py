"""What the kernels do to a chunk's logits in `linear_head`: statistics, loss, gradient over the logits, in Triton.

Importing this module needs Triton.
"""

from __future__ import annotations

from functools import partial

import torch

from asyppo_megatron.kernels import linear_head
from asyppo_megatron.kernels.policy_loss import loss_and_gradients
from asyppo_megatron.kernels.reference import Head, Implementation, Settings, Tokens
from asyppo_megatron.kernels.softmax import backward_rows, forward_rows


def _scores(logits: torch.Tensor, labels: torch.Tensor, head: Head) -> torch.Tensor:
    """Logprobs and entropies f32 [2, n] of a chunk."""
    return forward_rows(logits, labels, head.temperature, head.vocab_start, head.num_valid, head.tp_group)[0]


def _loss(
    logits: torch.Tensor, tokens: Tokens, settings: Settings, head: Head, wants_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`Implementation.loss`; the gradient is written over the logits."""
    shard = (head.temperature, head.vocab_start, head.num_valid)
    results, saved = forward_rows(logits, tokens.labels, *shard, head.tp_group)
    masks = (tokens.loss_mask, tokens.advantage_mask, tokens.entropy_mask)
    of_chunk = settings._replace(clip_low=tokens.clip_low, clip_high=tokens.clip_high)
    grads, sums = loss_and_gradients(*results, tokens.old_logprobs, tokens.advantages, masks, tokens.weights, of_chunk)
    if not wants_gradient:
        return results, sums, None
    backward_rows(logits, tokens.labels, saved, *grads, logits, *shard)
    return results, sums, logits


IMPLEMENTATION = Implementation(_scores, _loss)
linear_policy_loss = partial(linear_head.linear_policy_loss, implementation=IMPLEMENTATION)
linear_logprob_entropy = partial(linear_head.linear_logprob_entropy, implementation=IMPLEMENTATION)
