"""A mini-critic: trains on its own share of every group's responses (Eq. 2), then values all of them."""

from __future__ import annotations

from typing import Any

import torch

from asyppo_megatron.packing import mini_batches
from asyppo_megatron.parallel.seeding import derive_seed
from asyppo_megatron.ppo.losses import value_loss
from asyppo_megatron.ppo.segments import first_and_last
from asyppo_megatron.ppo.targets import explained_variance, explained_variance_sums
from asyppo_megatron.roles.role import Role
from asyppo_megatron.roles.runner import Pack, scatter
from asyppo_megatron.roles.sums import add_to
from asyppo_megatron.types import PackedBatch, sequence_ids

NUM_EV_SUMS = 5
# Where explained variance is measured: all tokens, and each response's first and last.
EV_PLACES = ("explained_variance", "explained_variance_first", "explained_variance_last")
SUMS = ("loss", "updates", "grad_norm", "lr", *(f"{place}_{i}" for place in EV_PLACES for i in range(NUM_EV_SUMS)))


class Critic:
    """Critic m as a role of the step."""

    def __init__(self, role: Role, index: int, *, seed: int, value_clip: float | None):
        self.role, self.index, self.value_clip = role, index, value_clip
        self.seed = derive_seed(seed, "critic", index)
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64, device=role.device)

    def values(self, batch: PackedBatch) -> torch.Tensor | None:
        """V_m of every position of the batch, f32 [T], on output ranks (zeros where another dp index has them)."""
        packs = self.role.runner.packs(batch, torch.arange(batch.num_trajectories))
        results = self.role.runner.forward(packs, lambda out, pack: pack.whole(out.flatten()))
        return scatter(results, packs, batch.num_tokens) if self.role.groups.is_output else None

    def update(
        self,
        batch: PackedBatch,
        returns: torch.Tensor,
        assignment: torch.Tensor | None,
        old_values: torch.Tensor | None,
    ) -> None:
        """Regress on the returns of its own trajectories.

        Args:
            returns: f32 [T].
            assignment: i8 [N], on the CPU: which critic trains on which trajectory; None: every one on all.
            old_values: f32 [T] of this critic before the update; needed for value clipping only.
        """
        self.sums.zero_()
        own = torch.arange(batch.num_trajectories)
        if assignment is not None:
            own = (assignment == self.index).nonzero().flatten()
        if not own.numel():
            return
        sequence = sequence_ids(batch.cu_seqlens, batch.num_tokens, batch.loss_mask.device)
        tokens = torch.zeros(batch.num_trajectories, dtype=torch.int64, device=sequence.device)
        tokens.index_add_(0, sequence, batch.loss_mask.long())
        ends = first_and_last(batch.loss_mask, batch.cu_seqlens)
        config = self.role.config
        size = min(config.mini_batch_size or len(own), len(own))
        for epoch in range(config.epochs):
            for part in mini_batches(len(own), size, seed=self.seed, step=batch.step, epoch=epoch):
                chosen = own[part]
                count = tokens[chosen.to(tokens.device)].sum().clamp(min=1)
                self._mini_batch(batch, returns, chosen, count, old_values, ends if epoch == 0 else None)

    def _mini_batch(
        self,
        batch: PackedBatch,
        returns: torch.Tensor,
        chosen: torch.Tensor,
        count: torch.Tensor,
        old_values: torch.Tensor | None,
        ends: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> None:
        """One optimizer step; `ends` (first and last tokens, bool [T]) where trajectories are met the first time."""
        packs = self.role.runner.packs(batch, chosen)

        def loss(out: torch.Tensor, pack: Pack) -> tuple[torch.Tensor, None]:
            values, mask, target = pack.whole(out.flatten()), pack.gather(batch.loss_mask), pack.gather(returns)
            clipping: dict[str, Any] = {}
            if self.value_clip is not None and old_values is not None:
                clipping = {"value_clip": self.value_clip, "old_values": pack.gather(old_values)}
            total, _ = value_loss(values, target, mask, pack.cu_seqlens, **clipping)
            total = total / count
            if self.role.groups.is_output:
                add_to(self.sums, SUMS, loss=total.detach())
                if ends is not None:
                    # Every trajectory is predicted here before it has been trained on.
                    places = [mask, *(pack.gather(end) for end in ends)]
                    sums = [explained_variance_sums(values.detach(), target, place) for place in places]
                    self.sums[-NUM_EV_SUMS * len(places) :] += torch.cat(sums)
            return total, None

        self.role.accumulate(packs, loss)
        norm, lr = self.role.step()
        if self.role.groups.is_lead:
            add_to(self.sums, SUMS, updates=1, grad_norm=norm, lr=lr)


def summarise(index: int, sums: dict[str, float]) -> dict[str, float]:
    """Metrics of one step from the summed `SUMS`."""
    updates = max(sums["updates"], 1)
    return {
        f"loss/critic_{index}": sums["loss"] / updates,
        f"grad_norm/critic_{index}": sums["grad_norm"] / updates,
        f"lr/critic_{index}": sums["lr"] / updates,
        f"updates/critic_{index}": sums["updates"],
    } | {f"{place}/critic_{index}": _explained(place, sums) for place in EV_PLACES}


def _explained(place: str, sums: dict[str, float]) -> float:
    parts = [sums[f"{place}_{i}"] for i in range(NUM_EV_SUMS)]
    return float(explained_variance(torch.tensor(parts, dtype=torch.float64)))
