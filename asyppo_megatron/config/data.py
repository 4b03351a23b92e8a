"""Sections of problems, rewards and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from asyppo_megatron.config.section import Section

PAPER_SYSTEM_PROMPT = "Please reason step by step, and put your final answer within \\boxed{}."  # appendix A.2


class RewardConfig(Section):
    kind: Literal["math", "exact"] = "math"
    workers: int = Field(4, ge=1)
    timeout_s: float = Field(6.0, gt=0)  # hard limit a call; the process is killed after it
    memory_gb: float = Field(2.0, gt=0)
    answer_pattern: str = r"#([^#$]*)\$?$"  # exact: the last match's group 1 is compared


class EvalSetConfig(Section):
    name: str
    path: Path
    limit: int | None = Field(None, ge=1)


class DataConfig(Section):
    train: Path
    eval: tuple[EvalSetConfig, ...] = ()
    tokenizer: Path | None = None  # None: actor.model
    chat_template: Literal["system", "none"] = "system"  # none: the problem text as it is
    system_prompt: str = PAPER_SYSTEM_PROMPT
    shuffle: bool = True


class EvalConfig(Section):
    every: int = Field(0, ge=0)  # steps; 0: never during training
    at_start: bool = True
    greedy: bool = True
    samples: int = Field(0, ge=0)  # k of avg@k; 0: greedy only
    temperature: float = Field(0.6, gt=0)
    top_p: float = Field(0.95, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    max_response_tokens: int | None = Field(None, ge=1)  # None: rollout.max_response_tokens
