"""The section of generation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from asyppo_megatron.config.section import Section


class RolloutConfig(Section):
    engine: Literal["embedded"] = "embedded"
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
