"""Verifiers: from a response's text and the reference answer to a reward."""

from __future__ import annotations

from asyppo_megatron.config import RewardConfig
from asyppo_megatron.rewards.base import Verdict, Verifier
from asyppo_megatron.rewards.exact import ExactMatch
from asyppo_megatron.rewards.math import MathVerifier

__all__ = ["ExactMatch", "MathVerifier", "Verdict", "Verifier", "build_verifier"]


def build_verifier(config: RewardConfig) -> Verifier:
    """The verifier that `reward.kind` names."""
    if config.kind == "exact":
        return ExactMatch(config.answer_pattern)
    return MathVerifier(config.workers, config.timeout_s, config.memory_gb)
