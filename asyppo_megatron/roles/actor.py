"""The actor: old logprobs before the update, the policy loss, and what is measured on the way."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from asyppo_megatron.config import ActorConfig, PPOConfig
from asyppo_megatron.kernels.policy import Operators
from asyppo_megatron.packing import mini_batches
from asyppo_megatron.ppo.kl import kl_estimate
from asyppo_megatron.ppo.losses import kl_loss
from asyppo_megatron.roles.policy_head import PackInputs, build_head, report_operators
from asyppo_megatron.roles.role import Role
from asyppo_megatron.roles.runner import Pack, scatter
from asyppo_megatron.roles.sums import add_to
from asyppo_megatron.types import PackedBatch, Targets, sequence_ids

# Sums over the actor's output ranks; `summarise` turns them into metrics.
SUMS = ("tokens", "entropy", "update_tokens", "loss", "clipped", "kl", "updates", "grad_norm", "lr", "reference_kl")


class Actor:
    """The policy as a role of the step.

    Every context-parallel rank computes the loss of whole packs; the first of them speaks for all.
    """

    def __init__(
        self,
        role: Role,
        config: ActorConfig,
        ppo: PPOConfig,
        operators: Operators,
        *,
        temperature: float,
        seed: int,
        max_response_tokens: int,
    ):
        self.role, self.ppo, self.seed = role, ppo, seed
        self.max_response_tokens = max_response_tokens
        self.head = build_head(
            operators,
            role.runner,
            role.module,
            role.spec.vocab_size,
            temperature,
            fused=config.fused_head,
            chunk=config.fused_head_chunk,
            fp32_logits=config.fused_head_fp32_logits,
        )
        if role.groups.is_lead:
            report_operators(role.name, operators, ppo.loss, fused=config.fused_head)
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64, device=role.device)
        self._add = partial(add_to, self.sums, SUMS)

    def evaluate(self, batch: PackedBatch) -> dict[str, torch.Tensor]:
        """Logprobs of the batch under the current weights, before they change.

        Returns:
            {"old_logprobs": f32 [T]} on output ranks, with zeros where another dp index has the token.
        """
        self.sums.zero_()
        packs = self.role.runner.packs(batch, torch.arange(batch.num_trajectories))
        labels = batch.labels()
        results = self.role.runner.forward(
            packs,
            lambda out, pack: self.head.scores(out, pack, pack.gather(labels)),
            lambda pack: self.head.expect_scores(pack, pack.gather(labels)),
        )
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
        waiting: dict[int, PackInputs] = {}

        def expect(pack: Pack) -> None:
            inputs = waiting[id(pack)] = self._inputs(pack, batch, targets, labels, count)
            self.head.expect_loss(pack, inputs)

        def loss(out: torch.Tensor, pack: Pack) -> tuple[torch.Tensor, None]:
            return self._pack_loss(out, pack, waiting.pop(id(pack)), targets), None

        self.role.accumulate(packs, loss, expect)
        norm, lr = self.role.step()
        if self.role.groups.is_lead:
            self._add(updates=1, grad_norm=norm, lr=lr)

    def _inputs(
        self, pack: Pack, batch: PackedBatch, targets: Targets, labels: torch.Tensor, count: torch.Tensor
    ) -> PackInputs:
        ppo = self.ppo
        mask = pack.gather(batch.loss_mask)
        length_norm = float(self.max_response_tokens) if ppo.aggregation.endswith("norm") else None
        extra = None
        if ppo.kl.coef and ppo.kl.where == "loss":
            extra = self._kl_penalty(pack, targets, mask, length_norm, count)
        return PackInputs(
            labels=pack.gather(labels),
            old_logprobs=pack.gather(targets.old_logprobs),
            advantages=pack.gather(targets.advantages),
            loss_mask=mask,
            advantage_mask=pack.gather(targets.advantage_mask),
            entropy_mask=pack.gather(targets.entropy_mask),
            cu_seqlens=pack.cu_seqlens,
            count=count,
            options={
                "kind": ppo.loss,
                "entropy_coef": ppo.entropy_coef,
                "clip_low": ppo.clip_low,
                "clip_high": ppo.clip_high,
                "dual_clip": ppo.dual_clip,
                "aggregation": ppo.aggregation,
                "length_norm": length_norm,
            },
            extra=extra,
        )

    def _kl_penalty(
        self, pack: Pack, targets: Targets, mask: torch.Tensor, length_norm: float | None, count: torch.Tensor
    ) -> Any:
        """Maps a pack's logprobs to its share of the KL term."""
        assert targets.reference_logprobs is not None
        kl, reference = self.ppo.kl, pack.gather(targets.reference_logprobs)

        def penalty(logprobs: torch.Tensor) -> torch.Tensor:
            total, _ = kl_loss(
                logprobs,
                reference,
                mask,
                pack.cu_seqlens,
                kind=kl.kind,
                aggregation=self.ppo.aggregation,
                length_norm=length_norm,
            )
            return kl.coef * total / count

        return penalty

    def _pack_loss(self, out: torch.Tensor, pack: Pack, inputs: PackInputs, targets: Targets) -> torch.Tensor:
        """A pack's share of the mini-batch's loss (Eq. 5 and its relatives); its metrics come from the same pass."""
        found = self.head.loss(out, pack, inputs)
        if self.role.groups.is_output:
            metrics = found.metrics
            self._add(loss=found.value, update_tokens=metrics["tokens"], clipped=metrics["clipped"], kl=metrics["kl"])
            if targets.reference_logprobs is not None:
                kl = kl_estimate(found.logprobs, pack.gather(targets.reference_logprobs), "k3")
                self._add(reference_kl=torch.where(inputs.loss_mask, kl, 0).sum())
        return found.loss


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
