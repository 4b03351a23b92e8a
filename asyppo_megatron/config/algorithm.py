"""Sections of the algorithm."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from asyppo_megatron.config.section import Section


class KLConfig(Section):
    coef: float = Field(0.0, ge=0)
    kind: Literal["k1", "k2", "k3"] = "k3"
    where: Literal["loss", "reward"] = "loss"


class PPOConfig(Section):
    """The algorithm (defaults: AsyPPO as in the paper, sections 4 and A.3)."""

    advantage: Literal["gae", "grpo", "dr_grpo", "rloo"] = "gae"
    gamma: float = Field(1.0, ge=0, le=1)
    lam: float = Field(1.0, ge=0, le=1)
    value_aggregate: Literal["mean", "min"] = "mean"
    advantage_mask_fraction: float = Field(0.2, ge=0, le=1)  # k
    entropy_mask_fraction: float = Field(0.2, ge=0, le=1)  # h
    entropy_coef: float = Field(0.01, ge=0)  # beta
    loss: Literal["ppo", "gspo", "cispo", "aspo", "asympo", "spo"] = "ppo"
    clip_low: float = Field(0.2, ge=0, le=1)
    clip_high: float = Field(0.2, ge=0)
    dual_clip: float | None = Field(None, gt=1)
    aggregation: Literal["seq-mean-token-mean", "token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"] = (
        "seq-mean-token-mean"
    )
    whiten_advantages: bool = False
    order: Literal["critics_first", "values_first"] = "critics_first"
    share_remainder: Literal["error", "rotate", "drop"] = "error"
    kl: KLConfig = KLConfig()
    importance: Literal["none", "truncated", "masked"] = "none"
    importance_cap: float = Field(2.0, gt=0)
