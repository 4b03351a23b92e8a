"""The whole configuration of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from asyppo_megatron.config.algorithm import FilteringConfig, PPOConfig
from asyppo_megatron.config.data import DataConfig, EvalConfig
from asyppo_megatron.config.rewards import RewardConfig
from asyppo_megatron.config.roles import ActorConfig, CriticConfig, ReferenceConfig, RoleConfig
from asyppo_megatron.config.rollout import RolloutConfig
from asyppo_megatron.config.section import Section
from asyppo_megatron.config.weight_sync import WeightSyncConfig

Method = Literal[
    "asyppo",
    "ppo",
    "symmetric_ppo",
    "naive_ensemble",
    "grpo",
    "dr_grpo",
    "rloo",
    "dapo",
    "gspo",
    "cispo",
    "vapo",
    "aspo",
    "asympo",
    "spo",
    "custom",
]


class CheckpointConfig(Section):
    every: int = Field(50, ge=0)  # steps; 0: only at the end
    keep: int = Field(2, ge=1)
    async_save: bool = True
    at_end: bool = True
    grace_s: float = Field(240.0, gt=0)  # of a step under way after a stop signal
    export_hf: bool = True  # Hugging Face model of the actor and the critics at the end


class LoggingConfig(Section):
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    wandb_project: str = "asyppo"
    level: Literal["DEBUG", "INFO", "WARNING"] = "INFO"


class Config(Section):
    run_dir: Path = Path("runs/asyppo")
    seed: int = 0
    num_steps: int = Field(500, ge=0)
    method: Method = "asyppo"
    critics_used: int | None = Field(None, ge=0)  # of those listed; None: as many as the method uses
    actor: ActorConfig
    critics: tuple[CriticConfig, ...] = ()
    reference: ReferenceConfig = ReferenceConfig()
    ppo: PPOConfig = PPOConfig()
    filtering: FilteringConfig = FilteringConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    rewards: tuple[RewardConfig, ...] = ()  # several, in place of reward
    data: DataConfig
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    weight_sync: WeightSyncConfig = WeightSyncConfig()
    logging: LoggingConfig = LoggingConfig()
    kernels: Literal["auto", "triton", "reference"] = "auto"  # auto: Triton on a GPU, plain torch elsewhere
    collective_timeout_s: float = Field(1800.0, gt=0)

    @property
    def num_critics(self) -> int:
        return len(self.critics)

    @property
    def num_ranks(self) -> int:
        return max(r for role in self.roles().values() for r in role.ranks) + 1

    @property
    def uses_reference(self) -> bool:
        return self.ppo.kl.coef > 0

    @property
    def trains_policy(self) -> bool:
        """Whether any step of the run updates the actor."""
        return any(self.ppo.updates_policy(step) for step in range(self.num_steps))

    @property
    def batch_size(self) -> int:
        return self.rollout.prompts_per_step * self.rollout.responses_per_prompt

    @property
    def all_rewards(self) -> tuple[RewardConfig, ...]:
        """`rewards`, or `reward` as the only one."""
        return self.rewards or (self.reward,)

    def rewards_by_place(self) -> list[tuple[str, RewardConfig]]:
        """Every reward with its key."""
        return [(f"rewards.{i}", r) for i, r in enumerate(self.rewards)] or [("reward", self.reward)]

    def roles(self) -> dict[str, RoleConfig]:
        """Trained roles by name, in the fixed order in which every rank builds them."""
        return {"actor": self.actor, **{f"critic_{m}": c for m, c in enumerate(self.critics)}}
