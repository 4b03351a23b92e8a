"""Sections of the algorithm."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from asyppo_megatron.config.section import Section

# Losses that are made of the current policy's logprobs alone.
WITHOUT_OLD_LOGPROBS = ("asympo", "spo")


class KLConfig(Section):
    coef: float = Field(0.0, ge=0)
    kind: Literal["k1", "k2", "k3"] = "k3"
    where: Literal["loss", "reward"] = "loss"


class PPOConfig(Section):
    """The algorithm (defaults: AsyPPO as in the paper, sections 4 and A.3; other methods': `config.methods`)."""

    advantage: Literal["gae", "grpo", "dr_grpo", "rloo"] = "gae"
    gamma: float = Field(1.0, ge=0, le=1)
    lam: float = Field(1.0, ge=0, le=1)
    length_adaptive_alpha: float | None = Field(None, gt=0)  # the actor's lambda by response length, in place of lam
    critic_lam: float | None = Field(None, ge=0, le=1)  # None: lam
    value_aggregate: Literal["mean", "min"] = "mean"
    advantage_mask_fraction: float = Field(0.2, ge=0, le=1)  # k
    entropy_mask_fraction: float = Field(0.2, ge=0, le=1)  # h
    entropy_coef: float = Field(0.01, ge=0)  # beta
    loss: Literal["ppo", "gspo", "cispo", "aspo", "asympo", "spo"] = "ppo"
    clip_low: float = Field(0.2, ge=0, le=1)
    clip_high: float = Field(0.2, ge=0)
    high_entropy_clip: float | None = Field(None, ge=0, le=1)  # both sides, where a response's entropy is highest
    high_entropy_fraction: float = Field(0.2, ge=0, le=1)
    dual_clip: float | None = Field(None, gt=1)
    negative_scale: float = Field(0.5, ge=0, le=1)  # of spo
    positive_nll_coef: float = Field(0.0, ge=0)
    aggregation: Literal["seq-mean-token-mean", "token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"] = (
        "seq-mean-token-mean"
    )
    whiten_advantages: bool = False
    order: Literal["critics_first", "values_first"] = "critics_first"
    critic_data: Literal["disjoint", "shared"] = "disjoint"
    share_remainder: Literal["error", "rotate", "drop"] = "error"
    critic_warmup_steps: int = Field(0, ge=0)
    policy_every: int = Field(1, ge=1)
    kl: KLConfig = KLConfig()
    importance: Literal["none", "truncated", "masked"] = "none"
    importance_cap: float = Field(2.0, gt=0)

    @property
    def has_kl_reward(self) -> bool:
        return self.kl.coef > 0 and self.kl.where == "reward"

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether a policy update reads the logprobs from before it; else the pass that scores them is left out."""
        return self.loss not in WITHOUT_OLD_LOGPROBS or self.importance != "none" or self.has_kl_reward

    def updates_policy(self, step: int) -> bool:
        """Whether the actor learns from the batch of a step (0-based); the critics learn from every batch."""
        since = step - self.critic_warmup_steps
        return since >= 0 and (since + 1) % self.policy_every == 0


class FilteringConfig(Section):
    """Which groups of responses make a batch, and what a long response costs (DAPO, arXiv 2503.14476)."""

    drop_equal_groups: bool = False
    max_rounds: int = Field(8, ge=1)
    overlong_fraction: float = Field(0.0, ge=0, lt=1)
    overlong_penalty: float = Field(1.0, ge=0)
