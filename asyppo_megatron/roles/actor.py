"""The actor: old logprobs before the update, the policy loss, and what is measured on the way."""

from __future__ import annotations

from typing import Any

import torch

from asyppo_megatron.config import PPOConfig
from asyppo_megatron.packing import mini_batches
from asyppo_megatron.ppo.kl import kl_estimate
from asyppo_megatron.ppo.logprob import logprob_entropy
from asyppo_megatron.ppo.losses import kl_loss, policy_loss
from asyppo_megatron.roles.role import Role
from asyppo_megatron.roles.runner import Pack, scatter
from asyppo_megatron.types import PackedBatch, Targets, sequence_ids

# Sums over the actor's output ranks; `summarise` turns them into metrics.
SUMS = ("tokens", "entropy", "update_tokens", "loss", "clipped", "kl", "updates", "grad_norm", "lr", "reference_kl")


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
        self.sums.zero_()
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

    def update(self, batch: PackedBatch, targets: Targets) -> None:
        """ppo_epochs x mini-batches of policy optimisation."""
        config = self.role.config
        labels = batch.labels()
        sequence = sequence_ids(batch.cu_seqlens, batch.num_tokens, batch.loss_mask.device)
        trainable = torch.zeros(batch.num_trajectories, dtype=torch.int64, device=sequence.device)
        trainable.index_add_(0, sequence, batch.loss_mask.long())
        size = config.mini_batch_size or batch.num_trajectories
        for epoch in range(config.epochs):
            for chosen in mini_batches(batch.num_trajectories, size, seed=self.seed, step=batch.step, epoch=epoch):
                self._mini_batch(batch, targets, labels, chosen, trainable[chosen.to(trainable.device)])

    def _mini_batch(
        self,
        batch: PackedBatch,
        targets: Targets,
        labels: torch.Tensor,
        chosen: torch.Tensor,
        trainable: torch.Tensor,
    ) -> None:
        packs = self.role.runner.packs(batch, chosen)
        tokens_mean = self.ppo.aggregation == "token-mean"
        count = (trainable.sum() if tokens_mean else (trainable > 0).sum()).clamp(min=1)

        def loss(out: torch.Tensor, pack: Pack) -> tuple[torch.Tensor, None]:
            total = self._pack_loss(out, pack, batch, targets, labels) / count
            if self.role.groups.is_output:
                self._add(loss=total.detach())
            return total, None

        self.role.accumulate(packs, loss)
        norm, lr = self.role.step()
        if self.role.groups.is_lead:
            self._add(updates=1, grad_norm=norm, lr=lr)

    def _pack_loss(
        self, out: torch.Tensor, pack: Pack, batch: PackedBatch, targets: Targets, labels: torch.Tensor
    ) -> torch.Tensor:
        """Sum part of the loss over a pack (Eq. 5 and its relatives), before the global denominator."""
        ppo = self.ppo
        logprobs, entropies = score_tokens(
            out, pack.gather(labels), self.role.groups, self.role.spec.vocab_size, self.temperature, inplace=False
        )
        mask, old = pack.gather(batch.loss_mask), pack.gather(targets.old_logprobs)
        advantages = pack.gather(targets.advantages)
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
            clip_low=ppo.clip_low,
            clip_high=ppo.clip_high,
            dual_clip=ppo.dual_clip,
            aggregation=ppo.aggregation,
            length_norm=length_norm,
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
            self._measure(logprobs.detach(), old, advantages, mask)
            if targets.reference_logprobs is not None:
                kl = kl_estimate(logprobs.detach(), pack.gather(targets.reference_logprobs), "k3")
                self._add(reference_kl=torch.where(mask, kl, 0).sum())
        return total

    def _measure(self, logprobs: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor) -> None:
        log_ratio = torch.where(mask, logprobs - old, 0)
        ratio = log_ratio.exp()
        clipped = ((ratio > 1 + self.ppo.clip_high) & (advantages > 0)) | (
            (ratio < 1 - self.ppo.clip_low) & (advantages < 0)
        )
        self._add(update_tokens=mask.sum(), clipped=(clipped & mask).sum(), kl=(ratio - 1 - log_ratio).sum())

    def _add(self, **values: Any) -> None:
        for name, value in values.items():
            self.sums[SUMS.index(name)] += value


def summarise(sums: dict[str, float]) -> dict[str, float]:
    """Metrics of one step from the summed `SUMS`."""
    updates = max(sums["updates"], 1)
    tokens = max(sums["update_tokens"], 1)
    return {
        "entropy": sums["entropy"] / max(sums["tokens"], 1),
        "loss/actor": sums["loss"] / updates,
        "clip_fraction": sums["clipped"] / tokens,
        "approx_kl": sums["kl"] / tokens,
        "reference_kl": sums["reference_kl"] / tokens,
        "grad_norm/actor": sums["grad_norm"] / updates,
        "lr/actor": sums["lr"] / updates,
        "updates/actor": sums["updates"],
    }
