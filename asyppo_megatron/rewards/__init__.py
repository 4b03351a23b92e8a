"""Rewards: from a response to what it is worth, as a whole, step by step or token by token."""

from __future__ import annotations

from typing import Any

from asyppo_megatron.config import Config, RewardConfig
from asyppo_megatron.rewards.base import Sample, Verdict, Verifier
from asyppo_megatron.rewards.code import CodeReward
from asyppo_megatron.rewards.combine import Judgement, RewardSet
from asyppo_megatron.rewards.exact import ExactMatch
from asyppo_megatron.rewards.function import FunctionReward
from asyppo_megatron.rewards.math import MathVerifier
from asyppo_megatron.rewards.model import ModelReward

__all__ = [
    "CodeReward",
    "ExactMatch",
    "FunctionReward",
    "Judgement",
    "MathVerifier",
    "ModelReward",
    "RewardSet",
    "Sample",
    "Verdict",
    "Verifier",
    "build_rewards",
    "build_verifier",
]


def build_verifier(config: RewardConfig) -> Verifier:
    """The verifier that `kind` names."""
    if config.kind == "exact":
        return ExactMatch(config.answer_pattern, config.timeout_s)
    if config.kind == "code":
        return CodeReward(config)
    if config.kind == "function":
        return FunctionReward(config)
    if config.kind == "model":
        return ModelReward(config)
    return MathVerifier(config.workers, config.timeout_s, config.memory_gb)


def build_rewards(config: Config, tokenizer: Any) -> RewardSet:
    """All rewards of a run; those of processes start them."""
    built: list[tuple[RewardConfig, Verifier]] = []
    try:
        for reward in config.all_rewards:
            built.append((reward, build_verifier(reward)))
    except (ValueError, RuntimeError):
        for _, verifier in built:
            verifier.close()
        raise
    return RewardSet(built, tokenizer)
