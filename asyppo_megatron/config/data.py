"""Sections of problems and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from asyppo_megatron.config.section import Section

PAPER_SYSTEM_PROMPT = "Please reason step by step, and put your final answer within \\boxed{}."  # appendix A.2


class SourceConfig(Section):
    """One of several sets of training problems."""

    name: str
    path: Path
    weight: float = Field(1.0, gt=0)  # share of the prompts, relative to the other sources'
    rewards: tuple[str, ...] = ()  # names of `rewards`, the first decides what is correct; (): all
    chat_template: Literal["system", "none"] | None = None  # None: data.chat_template
    system_prompt: str | None = None  # None: data.system_prompt


class EvalSetConfig(Section):
    name: str
    path: Path
    limit: int | None = Field(None, ge=1)
    rewards: tuple[str, ...] = ()  # as of a source; the first one is what is reported
    chat_template: Literal["system", "none"] | None = None
    system_prompt: str | None = None


class CurriculumConfig(Section):
    """Problems that are always or never solved come up less often."""

    enabled: bool = False
    floor: float = Field(0.1, gt=0, le=1)  # probability of taking a problem of pass rate 0 or 1 when its turn comes
    memory: int = Field(64, ge=2)  # responses that a pass rate remembers; older ones fade


class DataConfig(Section):
    train: Path | None = None  # this, or sources
    sources: tuple[SourceConfig, ...] = ()
    eval: tuple[EvalSetConfig, ...] = ()
    tokenizer: Path | None = None  # None: actor.model
    chat_template: Literal["system", "none"] = "system"  # none: the problem text as it is
    system_prompt: str = PAPER_SYSTEM_PROMPT
    shuffle: bool = True
    curriculum: CurriculumConfig = CurriculumConfig()

    @property
    def all_sources(self) -> tuple[SourceConfig, ...]:
        """`sources`, or `train` as the only one."""
        if self.sources or self.train is None:
            return self.sources
        return (SourceConfig(name="train", path=self.train),)

    @property
    def is_mixed(self) -> bool:
        """Whether prompts are drawn by more than one walk over one file."""
        return bool(self.sources) or self.curriculum.enabled


class EvalConfig(Section):
    every: int = Field(0, ge=0)  # steps; 0: never during training
    at_start: bool = True
    greedy: bool = True
    samples: int = Field(0, ge=0)  # k of avg@k; 0: greedy only
    temperature: float = Field(0.6, gt=0)
    top_p: float = Field(0.95, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    max_response_tokens: int | None = Field(None, ge=1)  # None: rollout.max_response_tokens
