"""One rank's part of a run: the roles it is a member of, and what they do together in a step."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from asyppo_megatron.backend import prepare_megatron
from asyppo_megatron.config import Config, CriticConfig, RoleConfig
from asyppo_megatron.convert.load import load_hf
from asyppo_megatron.kernels.policy import choose
from asyppo_megatron.models.spec import ModelSpec
from asyppo_megatron.observability.timing import PhaseTimer
from asyppo_megatron.parallel import exchange
from asyppo_megatron.parallel.layout import ParallelLayout
from asyppo_megatron.parallel.process_groups import GroupRegistry, RoleGroups, build_groups
from asyppo_megatron.parallel.seeding import derive_seed
from asyppo_megatron.ppo.advantages import length_adaptive_lambda
from asyppo_megatron.ppo.ensemble import assign_critics
from asyppo_megatron.ppo.targets import checksum, compute_targets, monte_carlo_returns
from asyppo_megatron.roles import actor as actor_module
from asyppo_megatron.roles import critic as critic_module
from asyppo_megatron.roles.actor import Actor
from asyppo_megatron.roles.critic import Critic
from asyppo_megatron.roles.reference import Reference
from asyppo_megatron.roles.role import Role, skip_optimizer_construction
from asyppo_megatron.types import PackedBatch, RunError, Scores, Targets

logger = logging.getLogger(__name__)


class NonFiniteError(RunError):
    """A loss, gradient, logprob or value is NaN or infinite."""


class World:
    """The roles of this rank. Every method is called by every rank, in the same order.

    Attributes:
        groups: of every role, None where this rank is no member.
        roles: trained roles of this rank by name.
    """

    def __init__(self, config: Config, device: torch.device, store: dist.Store, timer: PhaseTimer):
        prepare_megatron()
        self.config, self.device, self.store, self.timer = config, device, store, timer
        self.rank = dist.get_rank()
        self.operators = choose(device, config.kernels)
        registry = GroupRegistry(config.collective_timeout_s)
        self.groups: dict[str, RoleGroups | None] = {
            name: build_groups(ParallelLayout.of(role), registry, name) for name, role in config.roles().items()
        }
        self.roles: dict[str, Role] = {}
        self.actor: Actor | None = None
        self.critics: dict[int, Critic] = {}
        self.reference: Reference | None = None
        self._build_actor()
        for index, critic in enumerate(config.critics):
            self._build_critic(index, critic)
        # Of scores (0) and of updates (1): by role and rank, whether something was not finite.
        shape = (2, len(config.roles()), dist.get_world_size())
        self._flags = torch.zeros(shape, dtype=torch.float64, device=device)

    # --- building

    def _build_actor(self) -> None:
        config = self.config
        steps = sum(config.ppo.updates_policy(step) for step in range(config.num_steps))
        role = self._build_role("actor", config.actor, config.batch_size, steps)
        if role is None:
            return
        load_hf(role.module, role.spec, config.actor.model, tp_rank=role.groups.at.tp, tp_size=role.groups.layout.tp)
        role.weights_changed()
        rollout = config.rollout
        self.actor = Actor(
            role,
            config.actor,
            config.ppo,
            self.operators,
            temperature=rollout.temperature,
            seed=config.seed,
            max_response_tokens=rollout.max_response_tokens,
        )
        if config.uses_reference:
            path = config.reference.model or config.actor.model
            spec = ModelSpec.from_hf(path)
            self.reference = Reference(
                path, config.actor, spec, role.groups, self.operators, temperature=rollout.temperature
            )

    def _build_critic(self, index: int, config: CriticConfig) -> None:
        is_shared = self.config.ppo.critic_data == "shared"
        responses = self.config.batch_size // (1 if is_shared else max(self.config.num_critics, 1))
        role = self._build_role(f"critic_{index}", config, responses, self.config.num_steps)
        if role is None:
            return
        if role.groups.is_last_stage:
            seed = derive_seed(self.config.seed, "critic_head", index) if config.head_init == "random" else None
            role.module.output_layer.reset(seed)
        load_hf(
            role.module,
            role.spec,
            config.model,
            tp_rank=role.groups.at.tp,
            tp_size=role.groups.layout.tp,
            role="critic",
        )
        role.weights_changed()
        self.critics[index] = Critic(role, index, seed=self.config.seed, value_clip=config.value_clip)

    def _build_role(self, name: str, config: RoleConfig, responses: int, steps: int) -> Role | None:
        groups = self.groups[name]
        if groups is None:
            skip_optimizer_construction()
            return None
        per_epoch = -(-responses // min(config.mini_batch_size or responses, responses))
        role = Role(
            name,
            config,
            ModelSpec.from_hf(config.model),
            groups,
            value_head=name != "actor",
            total_updates=steps * config.epochs * per_epoch,
        )
        self.roles[name] = role
        return role

    # --- one step

    def evaluate(self, batch: PackedBatch) -> dict[str, torch.Tensor]:
        """What this rank's roles say about a batch, by score name; critics learn from it first (paper's order)."""
        self._flags.zero_()
        local: dict[str, torch.Tensor] = {}
        tokens = batch.num_tokens
        if self.actor is not None:
            self.actor.sums.zero_()
            if self._scores_actor(batch.step):
                with self.timer.phase("actor_logprobs", tokens, role="actor"):
                    local |= self._guard("actor", self.actor.evaluate(batch))
        if self.reference is not None:
            with self.timer.phase("reference_logprobs", tokens, role="reference"):
                local |= self.reference.evaluate(batch)
        critics_first = self.config.ppo.order == "critics_first"
        if critics_first and self.critics:
            returns = monte_carlo_returns(batch, self.config.ppo.gamma)
            self._update_critics(batch, returns, {})
        for index, critic in self.critics.items():
            with self.timer.phase("critic_values", tokens, role=f"critic_{index}"):
                values = critic.values(batch)
            if values is not None:
                local |= self._guard(f"critic_{index}", {f"values_{index}": values})
        return local

    def _scores_actor(self, step: int) -> bool:
        """Whether anything reads the actor's logprobs from before the update of a step."""
        ppo = self.config.ppo
        return ppo.has_kl_reward or (ppo.needs_old_logprobs and ppo.updates_policy(step))

    def score_names(self, step: int) -> list[str]:
        names = [f"values_{m}" for m in range(self.config.num_critics)]
        names = ["old_logprobs", *names] if self._scores_actor(step) else names
        return [*names, "reference_logprobs"] if self.config.uses_reference else names

    def exchange(self, batch: PackedBatch, local: dict[str, torch.Tensor]) -> Scores:
        """The one exchange between a batch and its targets."""
        table = exchange.gather_scores(local, self.score_names(batch.step), batch.num_tokens, self.device)
        count = self.config.num_critics
        values = [table[f"values_{m}"] for m in range(count)]
        return Scores(
            # What nobody reads is not scored again: the engine's are at hand.
            old_logprobs=table.get("old_logprobs", batch.rollout_logprobs),
            values=torch.stack(values) if values else torch.zeros(0, batch.num_tokens, device=self.device),
            reference_logprobs=table.get("reference_logprobs"),
        )

    def targets(self, batch: PackedBatch, scores: Scores) -> Targets:
        """The same targets on every rank, which a checksum proves.

        Raises:
            RuntimeError: ranks disagree (a fault of hardware or of this program).
        """
        ppo = self.config.ppo
        lam: float | torch.Tensor = ppo.lam
        if ppo.length_adaptive_alpha is not None:
            lam = length_adaptive_lambda(batch.loss_mask, batch.cu_seqlens, ppo.length_adaptive_alpha)
        targets = compute_targets(
            batch,
            scores,
            advantage=ppo.advantage,
            gamma=ppo.gamma,
            lam=lam,
            critic_lam=ppo.critic_lam,
            value_aggregate=ppo.value_aggregate,
            k=ppo.advantage_mask_fraction,
            h=ppo.entropy_mask_fraction,
            whiten=ppo.whiten_advantages,
            # Recomputing under newer weights than those that sampled would hide how stale the batch is.
            old_from="rollout" if self.config.rollout.max_staleness else "recomputed",
            importance=ppo.importance,
            importance_cap=ppo.importance_cap,
            kl_coef=ppo.kl.coef if ppo.kl.where == "reward" else 0.0,
            kl_kind=ppo.kl.kind,
            estimate=self.operators.ensemble_gae,
        )
        if bool(exchange.disagreement(checksum(targets))):
            raise RuntimeError(
                f"step {batch.step}: ranks computed different targets from the same batch; stopped before any update "
                "(look for a faulty device, or for processes of different versions)"
            )
        if not self._scores_actor(batch.step):
            # Against itself the engine has no mismatch: the actor measures it on the way where it can.
            measured = {name: m for name, m in targets.metrics.items() if not name.startswith("mismatch")}
            targets = replace(targets, metrics=measured)
        return targets

    def update(self, batch: PackedBatch, targets: Targets, scores: Scores) -> None:
        """The actor's optimisation; the critics' too when they come second."""
        if self.config.ppo.order == "values_first" and self.critics:
            self._update_critics(batch, targets.returns, {m: scores.values[m] for m in self.critics})
        if self.actor is not None and self.config.ppo.updates_policy(batch.step):
            with self.timer.phase("actor_update", batch.num_tokens * self.config.actor.epochs, role="actor"):
                self.actor.update(batch, targets, is_scored=self._scores_actor(batch.step))

    def _update_critics(self, batch: PackedBatch, returns: torch.Tensor, old: dict[int, torch.Tensor]) -> None:
        assignment, tokens = None, batch.num_tokens
        if self.config.ppo.critic_data == "disjoint":
            tokens //= self.config.num_critics
            assignment = assign_critics(
                batch.group_ids.cpu(),
                self.config.num_critics,
                seed=self.config.seed,
                step=batch.step,
                remainder=self.config.ppo.share_remainder,
            )
        for index, critic in self.critics.items():
            with self.timer.phase("critic_update", tokens, role=f"critic_{index}"):
                critic.update(batch, returns, assignment, old.get(index))

    def announce(self, key: str) -> None:
        """Tell ranks that `wait_for` the key."""
        self.store.set(key, "ready")

    def wait_for(self, key: str) -> None:
        """Sleep until another rank announced the key (the store's deadline applies)."""
        self.store.wait([key])
        self.store.delete_key(key)

    # --- measuring

    def _guard(self, name: str, scores: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for value in scores.values():
            self._flag(0, name, ~torch.isfinite(value).all())
        return scores

    def _flag(self, what: int, name: str, bad: torch.Tensor) -> None:
        self._flags[what, list(self.config.roles()).index(name), self.rank] += bad

    def metrics(self, step: int, extra: Sequence[float]) -> tuple[dict[str, float], list[float]]:
        """The step's role metrics on every rank, and the world's sums of `extra`; one collective, one host read.

        Raises:
            NonFiniteError: naming step, roles and ranks; on every rank.
        """
        sums = {f"critic_{m}": c.sums for m, c in self.critics.items()}
        if self.actor is not None:
            sums["actor"] = self.actor.sums
        parts = []
        for name in self.config.roles():
            width = len(actor_module.SUMS if name == "actor" else critic_module.SUMS)
            own = sums.get(name, torch.zeros(width, dtype=torch.float64, device=self.device))
            if name in sums:
                self._flag(1, name, ~torch.isfinite(own).all())
            parts.append(torch.nan_to_num(own))
        more = torch.tensor(list(extra), dtype=torch.float64, device=self.device)
        values = exchange.sum_vector(torch.cat([*parts, more, self._flags.flatten()]))
        flags = values[len(values) - self._flags.numel() :]
        self._raise_if_flagged(step, flags)
        metrics: dict[str, float] = {}
        for name in self.config.roles():
            names = actor_module.SUMS if name == "actor" else critic_module.SUMS
            own_sums = dict(zip(names, values, strict=False))
            values = values[len(names) :]
            if name == "actor":
                metrics |= actor_module.summarise(own_sums)
            else:
                metrics |= critic_module.summarise(int(name.removeprefix("critic_")), own_sums)
        return metrics, values[: len(extra)]

    def _raise_if_flagged(self, step: int, flags: list[float]) -> None:
        size, half = self._flags.size(2), len(flags) // 2
        flags = flags[:half] if any(flags[:half]) else flags[half:]  # bad scores explain bad updates of other roles
        bad = [
            f"{name} on rank {i % size}"
            for i, (name, flag) in enumerate(
                zip((n for n in self.config.roles() for _ in range(size)), flags, strict=True)
            )
            if flag
        ]
        if bad:
            raise NonFiniteError(
                f"step {step}: a loss, gradient, logprob or value is NaN or infinite in {', '.join(bad)}; stopped "
                "before these weights were saved or used, the last checkpoint is intact. Lower the learning rate of "
                "the role, or look at the step's rollouts"
            )
