"""Sections of generation and of the weights' way into the engines."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from asyppo_megatron.config.section import Section


class SGLangConfig(Section):
    """Where the engines are, and how patiently the driver talks to them."""

    urls: tuple[str, ...] = ()  # of servers that others started
    agents: tuple[str, ...] = ()  # node agents, asked for their engines
    max_concurrent: int = Field(256, ge=1)  # requests under way at one engine
    request_timeout_s: float = Field(3600.0, gt=0)  # of one response
    health_timeout_s: float = Field(30.0, gt=0)  # an engine that makes no token in it is given up
    patience_s: float = Field(600.0, gt=0)  # without any usable engine
    max_attempts: int = Field(5, ge=1)  # of one response
    kept_mass_every: int = Field(32, ge=0)  # responses between two whose kept mass is measured; 0: never


class RolloutConfig(Section):
    engine: Literal["embedded", "sglang"] = "embedded"
    prompts_per_step: int = Field(64, ge=1)
    responses_per_prompt: int = Field(32, ge=1)
    max_prompt_tokens: int = Field(1024, ge=1)
    max_response_tokens: int = Field(8192, ge=1)
    temperature: float = Field(0.99, gt=0)
    top_p: float = Field(0.99, gt=0, le=1)
    top_k: int = Field(100, ge=0)  # 0: off
    stop_token_ids: tuple[int, ...] = ()  # beside the tokenizer's and the model's end-of-sequence tokens
    max_batch: int = Field(256, ge=1)  # embedded engine: sequences generated at once
    timeout_s: float = Field(3600.0, gt=0)  # longest wait for one batch
    max_staleness: int = Field(0, ge=0)  # updates between a token's weights and the step that trains on it
    on_update: Literal["carry", "requeue"] = "carry"  # responses under way when new weights come
    partial: bool = False  # generation rests while the ranks train
    max_mismatch: float | None = Field(None, gt=0)  # mean |logprob difference| of a step, nats
    sglang: SGLangConfig = SGLangConfig()


class WeightSyncConfig(Section):
    bucket_mb: int = Field(256, ge=1)
    dir: Path | None = None  # None: shared memory when it has room, else the run directory
