"""The actor: old logprobs before the update, the policy loss, and what is measured on the way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from asyppo_megatron.config import PPOConfig
from asyppo_megatron.config.algorithm import WITHOUT_OLD_LOGPROBS
from asyppo_megatron.packing import mini_batches
from asyppo_megatron.ppo.kl import kl_estimate
from asyppo_megatron.ppo.logprob import logprob_entropy
from asyppo_megatron.ppo.losses import high_entropy_clip, kl_loss, policy_loss, positive_nll_loss
from asyppo_megatron.ppo.surrogates import Bound
from asyppo_megatron.roles.role import Role
from asyppo_megatron.roles.runner import Pack, scatter
from asyppo_megatron.types import PackedBatch, Targets, sequence_ids

# Sums over the actor's output ranks; `summarise` turns them into metrics.
SUMS = (
    "tokens",
    "entropy",
    "update_tokens",
    "loss",
    "clipped",
    "kl",
    "updates",
    "grad_norm",
    "lr",
    "reference_kl",
    "positive_nll",
    "positive_tokens",
    "fresh_tokens",
    "mismatch",
    "mismatch_k3",
)


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


def score_tokens(
    out: torch.Tensor, labels: torch.Tensor, role_groups: Any, vocab_size: int, temperature: float, *, inplace: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logprobs and entropies of a pack's actions from its logits [1, t, Vp / tp]."""
    logits = out.squeeze(0)
    shard = logits.size(-1)
    start = role_groups.at.tp * shard
    return logprob_entropy(
        logits,
        labels,
        temperature=temperature,
        vocab_start=start,
        num_valid=max(0, min(shard, vocab_size - start)),
        tp_group=role_groups.collection.tp,
        inplace=inplace,
    )


class Actor:
    """The policy as a role of the step."""

    def __init__(self, role: Role, ppo: PPOConfig, *, temperature: float, seed: int, max_response_tokens: int):
        self.role, self.ppo, self.temperature, self.seed = role, ppo, temperature, seed
        self.max_response_tokens = max_response_tokens
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64, device=role.device)

    def evaluate(self, batch: PackedBatch) -> dict[str, torch.Tensor]:
        """Logprobs of the batch under the current weights, before they change.

        Returns:
            {"old_logprobs": f32 [T]} on output ranks, with zeros where another dp index has the token.
        """
        packs = self.role.runner.packs(batch, torch.arange(batch.num_trajectories))
        labels = batch.labels()

        def collect(out: torch.Tensor, pack: Pack) -> tuple[torch.Tensor, torch.Tensor]:
            return score_tokens(
                out, pack.gather(labels), self.role.groups, self.role.spec.vocab_size, self.temperature, inplace=True
            )

        results = self.role.runner.forward(packs, collect)
        if not self.role.groups.is_output:
            return {}
        logprobs = scatter([r[0] for r in results], packs, batch.num_tokens)
        entropies = scatter([r[1] for r in results], packs, batch.num_tokens)
        mine = torch.zeros_like(batch.loss_mask)
        mine[torch.cat([p.index for p in packs])] = True
        mine &= batch.loss_mask
        self._add(tokens=mine.sum(), entropy=torch.where(mine, entropies, 0).sum(dtype=torch.float64))
        return {"old_logprobs": torch.where(mine, logprobs, 0)}

    def update(self, batch: PackedBatch, targets: Targets, *, is_scored: bool = True) -> None:
        """ppo_epochs x mini-batches of policy optimisation.

        Args:
            is_scored: `evaluate` was called for this batch; else the first mini-batch, which meets the weights that
                sampled it, measures what `evaluate` would have.
        """
        config = self.role.config
        tokens = self._tokens(batch)
        size = config.mini_batch_size or batch.num_trajectories
        is_fresh = not is_scored
        for epoch in range(config.epochs):
            for chosen in mini_batches(batch.num_trajectories, size, seed=self.seed, step=batch.step, epoch=epoch):
                self._mini_batch(batch, targets, tokens, chosen, is_fresh)
                is_fresh = False

    def _tokens(self, batch: PackedBatch) -> BatchTokens:
        sequence = sequence_ids(batch.cu_seqlens, batch.num_tokens, batch.loss_mask.device)
        trainable = torch.zeros(batch.num_trajectories, dtype=torch.int64, device=sequence.device)
        trainable.index_add_(0, sequence, batch.loss_mask.long())
        positive = (batch.rewards > 0).to(sequence.device) if self.ppo.positive_nll_coef else None
        return BatchTokens(batch.labels(), trainable, positive, None if positive is None else positive[sequence])

    def _mini_batch(
        self, batch: PackedBatch, targets: Targets, tokens: BatchTokens, chosen: torch.Tensor, is_fresh: bool
    ) -> None:
        packs = self.role.runner.packs(batch, chosen)
        chosen = chosen.to(tokens.trainable.device)
        trainable = tokens.trainable[chosen]
        tokens_mean = self.ppo.aggregation == "token-mean"
        count = (trainable.sum() if tokens_mean else (trainable > 0).sum()).clamp(min=1)
        positive = None if tokens.positive is None else (trainable * tokens.positive[chosen]).sum().clamp(min=1)

        def loss(out: torch.Tensor, pack: Pack) -> tuple[torch.Tensor, None]:
            logprobs, entropies = score_tokens(
                out,
                pack.gather(tokens.labels),
                self.role.groups,
                self.role.spec.vocab_size,
                self.temperature,
                inplace=False,
            )
            total = self._pack_loss(logprobs, entropies, pack, batch, targets) / count
            if positive is not None:
                total = total + self._positive_loss(logprobs, pack, batch, tokens) / positive
            if self.role.groups.is_output:
                self._add(loss=total.detach())
                if is_fresh:
                    self._measure_fresh(logprobs.detach(), entropies.detach(), pack, batch)
            return total, None

        self.role.accumulate(packs, loss)
        norm, lr = self.role.step()
        if self.role.groups.is_lead:
            self._add(updates=1, grad_norm=norm, lr=lr)

    def _pack_loss(
        self, logprobs: torch.Tensor, entropies: torch.Tensor, pack: Pack, batch: PackedBatch, targets: Targets
    ) -> torch.Tensor:
        """Sum part of the loss over a pack (Eq. 5 and its relatives), before the global denominator."""
        ppo = self.ppo
        mask, old = pack.gather(batch.loss_mask), pack.gather(targets.old_logprobs)
        advantages = pack.gather(targets.advantages)
        clip = self._clip_range(entropies, mask, pack)
        length_norm = float(self.max_response_tokens) if ppo.aggregation.endswith("norm") else None
        total, _ = policy_loss(
            logprobs,
            entropies,
            old,
            advantages,
            mask,
            pack.cu_seqlens,
            kind=ppo.loss,
            advantage_mask=pack.gather(targets.advantage_mask),
            entropy_mask=pack.gather(targets.entropy_mask),
            entropy_coef=ppo.entropy_coef,
            clip_low=clip[0],
            clip_high=clip[1],
            dual_clip=ppo.dual_clip,
            aggregation=ppo.aggregation,
            length_norm=length_norm,
            negative_scale=ppo.negative_scale,
        )
        if ppo.kl.coef and ppo.kl.where == "loss":
            assert targets.reference_logprobs is not None
            penalty, _ = kl_loss(
                logprobs,
                pack.gather(targets.reference_logprobs),
                mask,
                pack.cu_seqlens,
                kind=ppo.kl.kind,
                aggregation=ppo.aggregation,
                length_norm=length_norm,
            )
            total = total + ppo.kl.coef * penalty
        if self.role.groups.is_output:
            self._measure(logprobs.detach(), old, advantages, mask, clip)
            if targets.reference_logprobs is not None:
                kl = kl_estimate(logprobs.detach(), pack.gather(targets.reference_logprobs), "k3")
                self._add(reference_kl=torch.where(mask, kl, 0).sum())
        return total

    def _clip_range(self, entropies: torch.Tensor, mask: torch.Tensor, pack: Pack) -> tuple[Bound, Bound]:
        """clip_low and clip_high, [t] where a response's highest-entropy tokens have one of their own."""
        ppo = self.ppo
        if ppo.high_entropy_clip is None:
            return ppo.clip_low, ppo.clip_high
        wide, fraction = ppo.high_entropy_clip, ppo.high_entropy_fraction
        low, high = (
            high_entropy_clip(entropies, mask, pack.cu_seqlens, clip=clip, high_entropy=wide, fraction=fraction)
            for clip in (ppo.clip_low, ppo.clip_high)
        )
        return low, high

    def _positive_loss(
        self, logprobs: torch.Tensor, pack: Pack, batch: PackedBatch, tokens: BatchTokens
    ) -> torch.Tensor:
        """Sum part of VAPO's positive-example loss over a pack, before its denominator."""
        assert tokens.is_positive is not None
        total, count = positive_nll_loss(logprobs, pack.gather(tokens.is_positive), pack.gather(batch.loss_mask))
        if self.role.groups.is_output:
            self._add(positive_nll=total.detach(), positive_tokens=count)
        return self.ppo.positive_nll_coef * total

    def _measure(
        self,
        logprobs: torch.Tensor,
        old: torch.Tensor,
        advantages: torch.Tensor,
        mask: torch.Tensor,
        clip: tuple[Bound, Bound],
    ) -> None:
        log_ratio = torch.where(mask, logprobs - old, 0)
        ratio = log_ratio.exp()
        self._add(update_tokens=mask.sum(), kl=(ratio - 1 - log_ratio).sum())
        if self.ppo.loss in WITHOUT_OLD_LOGPROBS:
            return  # nothing is clipped there
        clipped = ((ratio > 1 + clip[1]) & (advantages > 0)) | ((ratio < 1 - clip[0]) & (advantages < 0))
        self._add(clipped=(clipped & mask).sum())

    def _measure_fresh(self, logprobs: torch.Tensor, entropies: torch.Tensor, pack: Pack, batch: PackedBatch) -> None:
        """Entropy, and the mismatch of engine and trainer, of weights that have not changed since the rollouts."""
        mask = pack.gather(batch.loss_mask)
        difference = torch.where(mask, logprobs - pack.gather(batch.rollout_logprobs), 0)
        self._add(
            tokens=mask.sum(),
            fresh_tokens=mask.sum(),
            entropy=torch.where(mask, entropies, 0).sum(dtype=torch.float64),
            mismatch=difference.abs().sum(dtype=torch.float64),
            mismatch_k3=kl_estimate(-difference, torch.zeros_like(difference), "k3").sum(dtype=torch.float64),
        )

    def _add(self, **values: Any) -> None:
        for name, value in values.items():
            self.sums[SUMS.index(name)] += value


def summarise(sums: dict[str, float]) -> dict[str, float]:
    """Metrics of one step from the summed `SUMS`."""
    updates = max(sums["updates"], 1)
    tokens = max(sums["update_tokens"], 1)
    found = {
        "loss/actor": sums["loss"] / updates,
        "clip_fraction": sums["clipped"] / tokens,
        "approx_kl": sums["kl"] / tokens,
        "reference_kl": sums["reference_kl"] / tokens,
        "grad_norm/actor": sums["grad_norm"] / updates,
        "lr/actor": sums["lr"] / updates,
        "updates/actor": sums["updates"],
    }
    if sums["tokens"]:
        found["entropy"] = sums["entropy"] / sums["tokens"]
    if sums["fresh_tokens"]:
        found["mismatch_mean"] = sums["mismatch"] / sums["fresh_tokens"]
        found["mismatch_k3_kl"] = sums["mismatch_k3"] / sums["fresh_tokens"]
    if sums["positive_tokens"]:
        found["loss/positive_nll"] = sums["positive_nll"] / sums["positive_tokens"]
    return found
