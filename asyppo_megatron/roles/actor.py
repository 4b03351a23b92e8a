"""The actor: old logprobs before the update, the policy loss, and what is measured on the way."""

from __future__ import annotations

from functools import partial

import torch

from asyppo_megatron.config import ActorConfig, PPOConfig
from asyppo_megatron.config.algorithm import WITHOUT_OLD_LOGPROBS
from asyppo_megatron.kernels.policy import Operators
from asyppo_megatron.packing import mini_batches
from asyppo_megatron.ppo.kl import kl_estimate
from asyppo_megatron.roles.pack_inputs import BatchTokens, PackInputs, pack_inputs
from asyppo_megatron.roles.policy_head import PackLoss, build_head, report_operators
from asyppo_megatron.roles.role import Role
from asyppo_megatron.roles.runner import Pack, scatter
from asyppo_megatron.roles.sums import add_to
from asyppo_megatron.types import PackedBatch, Targets

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
        self.length_norm = float(max_response_tokens) if ppo.aggregation.endswith("norm") else None
        self.head = build_head(config, operators, role.runner, role.module, role.spec.vocab_size, temperature)
        if role.groups.is_lead:
            report_operators(role.name, operators, ppo.loss, fused=config.fused_head)
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64, device=role.device)
        self._add = partial(add_to, self.sums, SUMS)

    def evaluate(self, batch: PackedBatch) -> dict[str, torch.Tensor]:
        """Logprobs of the batch under the current weights, before they change.

        Returns:
            {"old_logprobs": f32 [T]} on output ranks, with zeros where another dp index has the token.
        """
        packs = self.role.runner.packs(batch, torch.arange(batch.num_trajectories))
        labels = batch.labels()
        results = self.role.runner.forward(
            packs,
            lambda out, pack: self.head.scores(out, pack, labels),
            lambda pack: self.head.expect_scores(pack, labels),
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

    def update(self, batch: PackedBatch, targets: Targets, *, is_scored: bool = True) -> None:
        """ppo_epochs x mini-batches of policy optimisation.

        Args:
            is_scored: `evaluate` was called for this batch; else the first mini-batch, which meets the weights that
                sampled it, measures what `evaluate` would have.
        """
        config = self.role.config
        tokens = BatchTokens.of(batch, self.ppo)
        size = config.mini_batch_size or batch.num_trajectories
        is_fresh = not is_scored
        for epoch in range(config.epochs):
            for chosen in mini_batches(batch.num_trajectories, size, seed=self.seed, step=batch.step, epoch=epoch):
                self._mini_batch(batch, targets, tokens, chosen, is_fresh)
                is_fresh = False

    def _mini_batch(
        self, batch: PackedBatch, targets: Targets, tokens: BatchTokens, chosen: torch.Tensor, is_fresh: bool
    ) -> None:
        packs = self.role.runner.packs(batch, chosen)
        counts = tokens.counts(chosen, self.ppo.aggregation)
        waiting: dict[int, PackInputs] = {}

        def expect(pack: Pack) -> None:
            inputs = pack_inputs(self.ppo, pack, batch, targets, tokens, counts, self.length_norm)
            waiting[id(pack)] = inputs
            self.head.expect_loss(pack, inputs)

        def loss(out: torch.Tensor, pack: Pack) -> tuple[torch.Tensor, None]:
            inputs = waiting.pop(id(pack))
            found = self.head.loss(out, pack, inputs)
            if self.role.groups.is_output:
                self._measure(found, inputs)
                if is_fresh:
                    self._measure_fresh(found, inputs, pack.gather(batch.rollout_logprobs))
            return found.loss, None

        self.role.accumulate(packs, loss, expect)
        norm, lr = self.role.step()
        if self.role.groups.is_lead:
            self._add(updates=1, grad_norm=norm, lr=lr)

    def _measure(self, found: PackLoss, inputs: PackInputs) -> None:
        """Take the metrics of the loss's own pass over a pack."""
        metrics = found.metrics
        self._add(loss=found.value, update_tokens=metrics["tokens"], kl=metrics["kl"])
        if self.ppo.loss not in WITHOUT_OLD_LOGPROBS:  # nothing is clipped there
            self._add(clipped=metrics["clipped"])
        if "positive_nll" in metrics:
            self._add(positive_nll=metrics["positive_nll"], positive_tokens=metrics["positive_tokens"])
        if inputs.reference_logprobs is not None:
            kl = kl_estimate(found.logprobs, inputs.reference_logprobs, "k3")
            self._add(reference_kl=torch.where(inputs.loss_mask, kl, 0).sum())

    def _measure_fresh(self, found: PackLoss, inputs: PackInputs, rollout_logprobs: torch.Tensor) -> None:
        """Entropy, and the mismatch of engine and trainer, of weights that have not changed since the rollouts."""
        mask = inputs.loss_mask
        difference = torch.where(mask, found.logprobs - rollout_logprobs, 0)
        self._add(
            tokens=found.metrics["tokens"],
            fresh_tokens=found.metrics["tokens"],
            entropy=found.metrics["entropy"],
            mismatch=difference.abs().sum(dtype=torch.float64),
            mismatch_k3=kl_estimate(-difference, torch.zeros_like(difference), "k3").sum(dtype=torch.float64),
        )


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
