"""What the policy loss of a pack is made of, besides the model's output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from asyppo_megatron.config import PPOConfig
from asyppo_megatron.ppo.losses import high_entropy_clip, kl_loss, positive_nll_loss
from asyppo_megatron.ppo.surrogates import Bound
from asyppo_megatron.roles.runner import Pack
from asyppo_megatron.types import PackedBatch, Targets, sequence_ids

# Maps a pack's logprobs [t] to further terms of its loss, denominators applied, and their metrics.
Extra = Callable[[torch.Tensor], tuple[torch.Tensor, dict[str, torch.Tensor]]]


@dataclass(frozen=True)
class Counts:
    """Global denominators of a mini-batch, 0-dim.

    Attributes:
        loss: of the policy loss: tokens or responses.
        positive: trainable tokens of responses of positive reward; None where nothing asks for it.
    """

    loss: torch.Tensor
    positive: torch.Tensor | None


@dataclass(frozen=True)
class BatchTokens:
    """What an update needs to know about all tokens of a batch.

    Attributes:
        labels: i64 [T], the action of every position.
        trainable: i64 [N], trainable tokens of each trajectory.
        positive: bool [N], reward > 0; None where nothing asks for it.
        is_positive: bool [T], the same at every position.
    """

    labels: torch.Tensor
    trainable: torch.Tensor
    positive: torch.Tensor | None
    is_positive: torch.Tensor | None

    @classmethod
    def of(cls, batch: PackedBatch, ppo: PPOConfig) -> BatchTokens:
        sequence = sequence_ids(batch.cu_seqlens, batch.num_tokens, batch.loss_mask.device)
        trainable = torch.zeros(batch.num_trajectories, dtype=torch.int64, device=sequence.device)
        trainable.index_add_(0, sequence, batch.loss_mask.long())
        positive = (batch.rewards > 0).to(sequence.device) if ppo.positive_nll_coef else None
        return cls(batch.labels(), trainable, positive, None if positive is None else positive[sequence])

    def counts(self, chosen: torch.Tensor, aggregation: str) -> Counts:
        """Of the mini-batch of some trajectories (i64 [n])."""
        chosen = chosen.to(self.trainable.device)
        trainable = self.trainable[chosen]
        loss = (trainable.sum() if aggregation == "token-mean" else (trainable > 0).sum()).clamp(min=1)
        if self.positive is None:
            return Counts(loss, None)
        return Counts(loss, (trainable * self.positive[chosen]).sum().clamp(min=1))


@dataclass(frozen=True)
class PackInputs:
    """Attributes:
    labels: i64 [t], as all of these of the whole pack.
    old_logprobs: f32 [t], nats.
    advantages: f32 [t].
    loss_mask, advantage_mask, entropy_mask: bool [t].
    reference_logprobs: f32 [t], nats, or None.
    cu_seqlens: i32 [n + 1].
    count: 0-dim, the global denominator of the mini-batch.
    options: settings of `kernels.reference.policy_loss`.
    clip: maps the pack's entropies [t] to clip_low and clip_high, or None where `options` has them.
    extra: further terms of the loss, or None.
    """

    labels: torch.Tensor
    old_logprobs: torch.Tensor
    advantages: torch.Tensor
    loss_mask: torch.Tensor
    advantage_mask: torch.Tensor
    entropy_mask: torch.Tensor
    reference_logprobs: torch.Tensor | None
    cu_seqlens: torch.Tensor
    count: torch.Tensor
    options: Mapping[str, Any]
    clip: Callable[[torch.Tensor], tuple[Bound, Bound]] | None = None
    extra: Extra | None = None


def pack_inputs(
    ppo: PPOConfig,
    pack: Pack,
    batch: PackedBatch,
    targets: Targets,
    tokens: BatchTokens,
    counts: Counts,
    length_norm: float | None,
) -> PackInputs:
    """The inputs of one pack of a mini-batch."""
    mask = pack.gather(batch.loss_mask)
    reference = None if targets.reference_logprobs is None else pack.gather(targets.reference_logprobs)
    options: dict[str, Any] = {
        "kind": ppo.loss,
        "entropy_coef": ppo.entropy_coef,
        "clip_low": ppo.clip_low,
        "clip_high": ppo.clip_high,
        "dual_clip": ppo.dual_clip,
        "aggregation": ppo.aggregation,
        "length_norm": length_norm,
    }
    if ppo.loss == "spo":
        options["negative_scale"] = ppo.negative_scale
    return PackInputs(
        labels=pack.gather(tokens.labels),
        old_logprobs=pack.gather(targets.old_logprobs),
        advantages=pack.gather(targets.advantages),
        loss_mask=mask,
        advantage_mask=pack.gather(targets.advantage_mask),
        entropy_mask=pack.gather(targets.entropy_mask),
        reference_logprobs=reference,
        cu_seqlens=pack.cu_seqlens,
        count=counts.loss,
        options=options,
        clip=None if ppo.high_entropy_clip is None else _clip_range(ppo, pack, mask),
        extra=_extra(ppo, pack, mask, reference, tokens, counts, length_norm),
    )


def _clip_range(
    ppo: PPOConfig, pack: Pack, mask: torch.Tensor
) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """clip_low and clip_high [t] where a response's highest-entropy tokens have one of their own."""
    assert ppo.high_entropy_clip is not None
    wide, fraction = ppo.high_entropy_clip, ppo.high_entropy_fraction

    def clip(entropies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = (
            high_entropy_clip(entropies, mask, pack.cu_seqlens, clip=usual, high_entropy=wide, fraction=fraction)
            for usual in (ppo.clip_low, ppo.clip_high)
        )
        return low, high

    return clip


def _extra(
    ppo: PPOConfig,
    pack: Pack,
    mask: torch.Tensor,
    reference: torch.Tensor | None,
    tokens: BatchTokens,
    counts: Counts,
    length_norm: float | None,
) -> Extra | None:
    """The KL term and VAPO's positive-example term, where they are switched on."""
    has_kl = ppo.kl.coef > 0 and ppo.kl.where == "loss"
    if not has_kl and tokens.is_positive is None:
        return None
    is_positive = None if tokens.is_positive is None else pack.gather(tokens.is_positive)

    def extra(logprobs: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        total, metrics = logprobs.new_zeros(()), {}
        if has_kl:
            assert reference is not None
            penalty, _ = kl_loss(
                logprobs,
                reference,
                mask,
                pack.cu_seqlens,
                kind=ppo.kl.kind,
                aggregation=ppo.aggregation,
                length_norm=length_norm,
            )
            total = total + ppo.kl.coef * penalty / counts.loss
        if is_positive is not None:
            nll, count = positive_nll_loss(logprobs, is_positive, mask)
            total = total + ppo.positive_nll_coef * nll / counts.positive
            metrics = {"positive_nll": nll.detach(), "positive_tokens": count}
        return total, metrics

    return extra
