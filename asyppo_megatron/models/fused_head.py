"""A language head that scores tokens, or computes the policy loss, without ever holding their logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear

from asyppo_megatron.kernels.linear_head import LinearPolicyLoss
from asyppo_megatron.kernels.policy import Operators
from asyppo_megatron.kernels.reference import Head

# Of Megatron-Core: each of them uses the head's logits or its gradient behind our back.
REFUSED = ("mtp_num_layers", "use_mup", "defer_embedding_wgrad_compute")


@dataclass(frozen=True)
class ScoreTask:
    """Logprobs and entropies of a pack's actions, without gradient.

    Attributes:
        labels: i64 [t], of this context-parallel rank's tokens.
    """

    labels: torch.Tensor


@dataclass(frozen=True)
class LossTask:
    """A pack's share of the policy loss; backward must be given 1 for it.

    Attributes:
        tokens: what `linear_policy_loss` wants to know of each token, [t] each, `token_weights` with the mini-batch's
            count applied.
        options: the loss's settings.
    """

    tokens: Mapping[str, torch.Tensor]
    options: Mapping[str, Any]


class FusedOutputLayer(ColumnParallelLinear):
    """`GPTModel.output_layer` with the same weight under the same name, told beforehand what to make of it.

    Without a task it is the layer it replaces. It bypasses that layer's communication: hidden states are gathered, and
    their gradient is scattered, a chunk at a time.

    Attributes:
        task: what the next forward pass is for; taken off by it.
        result: of the last pass with a `LossTask`.
    """

    def __init__(self, original: ColumnParallelLinear, operators: Operators, head: Head, *, weight_is_embedding: bool):
        config = original.config
        wrong = [name for name in REFUSED if getattr(config, name, None)]
        if wrong:
            raise ValueError(f"fused head: got {', '.join(wrong)}, need none of them; set actor.fused_head to false")
        super().__init__(
            original.input_size,
            original.output_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=original.gather_output,
            skip_weight_param_allocation=True,
            tp_group=original.tp_group,
        )
        if original.weight is not None:
            self.weight = original.weight
        self.operators, self.head = operators, head
        self.weight_is_embedding = weight_is_embedding
        self.task: ScoreTask | LossTask | None = None
        self.result: LinearPolicyLoss | None = None

    def forward(
        self, input_: torch.Tensor, weight: torch.Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[torch.Tensor, None]:
        """[s, 1, H] (its own part under sequence parallelism) -> logits; [t, 1, 2] scores; or the loss, [1, 1, 1]."""
        task, self.task = self.task, None
        if task is None:
            return super().forward(input_, weight, runtime_gather_output)
        used = self.weight if weight is None else weight
        hidden = input_.squeeze(1)
        if isinstance(task, ScoreTask):
            scores = self.operators.linear_logprob_entropy(hidden, used, task.labels, self.head)
            return torch.stack(scores, -1).unsqueeze(1), None
        main_grad = getattr(used, "main_grad", None)
        self.result = self.operators.linear_policy_loss(
            hidden,
            used,
            cu_seqlens=None,
            main_grad=main_grad,
            **task.tokens,
            **task.options,
            **self.head._asdict(),
        )
        if main_grad is not None:
            # The weight's gradient is in main_grad. Backward still hands out zeros for it, so that the data-parallel
            # hooks fire; they need not be added, unless the embedding's gradient comes along with them.
            used.grad_added_to_main_grad = not self.weight_is_embedding  # type: ignore[attr-defined]
        return self.result.sum.view(1, 1, 1), None


def install_fused_head(
    model: Any, operators: Operators, *, vocab_size: int, temperature: float, fp32_logits: bool, chunk: int
) -> FusedOutputLayer | None:
    """Put a `FusedOutputLayer` into the last stage of a model; None on the other stages.

    Args:
        model: GPTModel, before it is wrapped.
        vocab_size: without the padding.
        chunk: tokens whose logits exist at a time.
    """
    if not model.post_process:
        return None
    original, group = model.output_layer, model.pg_collection.tp
    width = original.output_size_per_partition
    start = group.rank() * width
    head = Head(
        temperature=temperature,
        vocab_start=start,
        num_valid=max(0, min(width, vocab_size - start)),
        tp_group=group,
        chunk=chunk,
        fp32_logits=fp32_logits,
        sequence_parallel=original.sequence_parallel,
    )
    is_embedding = model.share_embeddings_and_output_weights and model.pre_process
    layer = FusedOutputLayer(original, operators, head, weight_is_embedding=is_embedding)
    model.output_layer = layer
    return layer
