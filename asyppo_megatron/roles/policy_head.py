"""From a model's output to logprobs and the policy loss of a pack: from its logits, or from a head that keeps none."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from asyppo_megatron.config import ActorConfig
from asyppo_megatron.kernels.policy import Operators
from asyppo_megatron.kernels.reference import SEPARABLE, token_weights
from asyppo_megatron.models.fused_head import FusedOutputLayer, LossTask, ScoreTask, install_fused_head
from asyppo_megatron.parallel.process_groups import RoleGroups
from asyppo_megatron.roles.pack_inputs import PackInputs
from asyppo_megatron.roles.runner import Pack, PackRunner

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackLoss:
    """Attributes:
    loss: 0-dim, differentiable: the pack's share of the mini-batch's loss, or this context-parallel rank's part of it.
    value: 0-dim, the pack's share, whole on every rank.
    metrics: `kernels.reference.METRICS` of the pack, and those of further terms, whole on every rank.
    logprobs: f32 [t], without gradient, as the entropies.
    entropies: f32 [t].
    """

    loss: torch.Tensor
    value: torch.Tensor
    metrics: Mapping[str, torch.Tensor]
    logprobs: torch.Tensor
    entropies: torch.Tensor


class PolicyHead(Protocol):
    """The last step of a policy. `expect_*` comes before a pack's forward pass, on the last pipeline stage."""

    def expect_scores(self, pack: Pack, labels: torch.Tensor) -> None: ...

    def scores(self, out: torch.Tensor, pack: Pack, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logprobs and entropies of a pack's actions, f32 [t] each; labels i64 [T] of the whole batch."""

    def expect_loss(self, pack: Pack, inputs: PackInputs) -> None: ...

    def loss(self, out: torch.Tensor, pack: Pack, inputs: PackInputs) -> PackLoss: ...


class LogitsHead:
    """From the logits [1, t / cp, Vp / tp], which it overwrites with their gradient."""

    def __init__(self, operators: Operators, groups: RoleGroups, vocab_size: int, temperature: float):
        self.operators, self.groups = operators, groups
        self.vocab_size, self.temperature = vocab_size, temperature

    def expect_scores(self, pack: Pack, labels: torch.Tensor) -> None:
        pass

    def scores(self, out: torch.Tensor, pack: Pack, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._scores(out, pack, pack.gather(labels))

    def _scores(self, out: torch.Tensor, pack: Pack, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = out.squeeze(0)
        shard = logits.size(-1)
        start = self.groups.at.tp * shard
        both = self.operators.logprob_entropy(
            logits,
            pack.local(labels),
            temperature=self.temperature,
            vocab_start=start,
            num_valid=max(0, min(shard, self.vocab_size - start)),
            tp_group=self.groups.collection.tp,
            inplace=True,  # nobody else reads the logits
        )
        return _whole(pack, *both)

    def expect_loss(self, pack: Pack, inputs: PackInputs) -> None:
        pass

    def loss(self, out: torch.Tensor, pack: Pack, inputs: PackInputs) -> PackLoss:
        logprobs, entropies = self._scores(out, pack, inputs.labels)
        options = dict(inputs.options)
        if inputs.clip is not None:
            options["clip_low"], options["clip_high"] = inputs.clip(entropies.detach())
        found = self.operators.policy_loss(
            logprobs,
            entropies,
            inputs.old_logprobs,
            inputs.advantages,
            inputs.loss_mask,
            inputs.cu_seqlens,
            advantage_mask=inputs.advantage_mask,
            entropy_mask=inputs.entropy_mask,
            **options,
        )
        total = found.sum / inputs.count
        metrics = found.metrics
        if inputs.extra is not None:
            terms, more = inputs.extra(logprobs)
            total, metrics = total + terms, metrics | more
        return PackLoss(total, total.detach(), metrics, logprobs.detach(), entropies.detach())


class FusedHead:
    """From the hidden states, by a `FusedOutputLayer` in the model (`layer` is None before the last stage)."""

    def __init__(self, layer: FusedOutputLayer | None, groups: RoleGroups):
        self.layer, self.groups = layer, groups

    def expect_scores(self, pack: Pack, labels: torch.Tensor) -> None:
        self._layer.task = ScoreTask(pack.local(pack.gather(labels)))

    def scores(self, out: torch.Tensor, pack: Pack, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _whole(pack, *out.squeeze(0).unbind(-1))

    def expect_loss(self, pack: Pack, inputs: PackInputs) -> None:
        options = dict(inputs.options)
        weights, _ = token_weights(
            inputs.loss_mask, inputs.cu_seqlens, options.pop("aggregation"), options.pop("length_norm")
        )
        per_token = {
            "labels": inputs.labels,
            "old_logprobs": inputs.old_logprobs,
            "advantages": inputs.advantages,
            "loss_mask": inputs.loss_mask,
            "advantage_mask": inputs.advantage_mask,
            "entropy_mask": inputs.entropy_mask,
            # The count goes in here, so that backward gets exactly 1 for the sum and nobody waits for its value.
            "token_weights": weights / inputs.count,
        }
        self._layer.task = LossTask({name: pack.local(x) for name, x in per_token.items()}, options)

    def loss(self, out: torch.Tensor, pack: Pack, inputs: PackInputs) -> PackLoss:
        result = self._layer.result
        assert result is not None and inputs.clip is None and inputs.extra is None  # the configuration's checks
        self._layer.result = None
        sums = torch.stack([out.detach().double().view(()), *result.metrics.values()])
        if pack.split is not None:  # over the context-parallel group, by every rank of it
            torch.distributed.all_reduce(sums, group=pack.split.group)
        value, *metrics = sums.unbind()
        scores = _whole(pack, result.logprobs, result.entropies)
        # A sum, not a view: Megatron frees what a pipeline stage has put out.
        return PackLoss(out.sum(), value, dict(zip(result.metrics, metrics, strict=True)), *scores)

    @property
    def _layer(self) -> FusedOutputLayer:
        assert self.layer is not None
        return self.layer


def _whole(pack: Pack, *scores: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Each [t / cp] as [t], by one gather."""
    if pack.split is None:
        return scores
    return pack.whole(torch.stack(scores, -1)).unbind(-1)


def build_head(
    config: ActorConfig, operators: Operators, runner: PackRunner, module: Any, vocab_size: int, temperature: float
) -> PolicyHead:
    """The head that the configuration asks for; a fused one is put into the model."""
    if not config.fused_head:
        return LogitsHead(operators, runner.groups, vocab_size, temperature)
    layer = install_fused_head(
        module,
        operators,
        vocab_size=vocab_size,
        temperature=temperature,
        fp32_logits=config.fused_head_fp32_logits,
        chunk=config.fused_head_chunk,
    )
    return FusedHead(layer, runner.groups)


def report_operators(name: str, operators: Operators, kind: str, *, fused: bool) -> None:
    """Say once what a role computes with, and which of it has no kernel."""
    logger.info("%s: operators %s, %s head", name, operators.name, "fused" if fused else "logits")
    if operators.name == "triton" and kind not in SEPARABLE:
        logger.warning(
            "%s: policy loss %s has no kernel (it needs sums over a response); it runs in plain torch, on the logprobs "
            "of the kernel",
            name,
            kind,
        )
