"""Sections of rewards: how responses are scored."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from asyppo_megatron.config.section import Section


class SandboxConfig(Section):
    """What a program may use (`kind: code`); its memory is `reward.memory_gb`, its time for all tests `timeout_s`."""

    uid: int = Field(64000, ge=1)  # as root, worker i runs programs as user uid + i
    test_timeout_s: float = Field(4.0, gt=0)  # wall-clock and CPU seconds of one test
    processes: int = Field(16, ge=1)  # processes and threads at once
    file_mb: float = Field(16.0, gt=0)  # of all files together
    open_files: int = Field(64, ge=8)
    output_kb: int = Field(1024, ge=1)
    python: Path | None = None  # interpreter of programs; None: this one, without its packages
    score: Literal["all", "fraction"] = "all"  # 1 where all tests pass, or the share of tests that do
    allow_unprotected: bool = False  # run programs where the machine allows no isolation


class RewardModelConfig(Section):
    """A reward model behind HTTP (`kind: model`); `workers` requests at once, `timeout_s` each."""

    url: str = ""
    api: Literal["sglang", "pooling"] = "sglang"  # /classify of SGLang, or /pooling: a score a token, as vLLM has it
    name: str = ""  # of the model, where the server wants one
    batch: int = Field(16, ge=1)  # sequences a request
    patience_s: float = Field(300.0, gt=0)  # a server that does not answer ends the run after this
    transform: Literal["none", "sigmoid"] = "none"


class RewardConfig(Section):
    name: str = ""  # of its metrics; "": the kind
    weight: float = 1.0
    kind: Literal["math", "exact", "code", "function", "model"] = "math"
    per: Literal["response", "step", "token"] = "response"  # step, token: kinds function and model
    step_separator: str = r"\n\s*\n"  # regular expression between two steps
    max_steps: int = Field(128, ge=1)  # the last one takes the rest
    function: str = ""  # function: "package.module:name"
    workers: int = Field(4, ge=1)
    timeout_s: float = Field(6.0, gt=0)  # hard limit a call; the process is killed after it
    memory_gb: float = Field(2.0, gt=0)
    answer_pattern: str = r"#([^#$]*)\$?$"  # exact: the last match's group 1 is compared
    sandbox: SandboxConfig = SandboxConfig()
    model: RewardModelConfig = RewardModelConfig()

    @property
    def label(self) -> str:
        return self.name or self.kind
