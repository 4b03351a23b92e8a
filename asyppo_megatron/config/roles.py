"""Sections of the models of a run: layout, optimizer, role."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from asyppo_megatron.config.section import Section


class LayoutConfig(Section):
    """Parallel layout of one role; data parallelism is what remains of its ranks."""

    tp: int = Field(1, ge=1)
    pp: int = Field(1, ge=1)
    cp: int = Field(1, ge=1)
    sequence_parallel: bool | None = None  # None: on when tp > 1

    @property
    def sp(self) -> bool:
        return self.tp > 1 if self.sequence_parallel is None else self.sequence_parallel


class OptimizerConfig(Section):
    """AdamW with warm-up and decay; steps are optimizer steps of the role."""

    lr: float = Field(1e-6, gt=0)
    min_lr: float = Field(0.0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    clip_grad: float = Field(1.0, ge=0)  # 0: off
    warmup_steps: int = Field(0, ge=0)
    decay: Literal["constant", "linear", "cosine"] = "constant"
    decay_steps: int | None = Field(None, ge=1)  # None: the run's length
    distributed: bool = True  # shard optimizer state over data parallel


class RoleConfig(Section):
    """One model of the run: where it starts from, where it runs, how it trains."""

    model: Path
    model_file: Path | None = None  # its architecture, and defaults of this role
    ranks: tuple[int, ...] = (0,)
    layout: LayoutConfig = LayoutConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    precision: Literal["fp32", "bf16"] = "bf16"
    recompute: Literal["none", "selective", "full"] = "none"
    max_tokens_per_micro_batch: int = Field(16384, ge=1)
    mini_batch_size: int | None = Field(None, ge=1)  # responses an optimizer step; None: the whole batch
    epochs: int = Field(1, ge=1)
    # colocated engines: what goes to host memory while they generate; optimizer: with the gradients
    offload: Literal["none", "optimizer", "all"] = "none"

    @field_validator("ranks", mode="before")
    @classmethod
    def _parse_ranks(cls, value: Any) -> Any:
        """Accepts `3`, `"0-1"`, `"0,2-3"` or a list of numbers."""
        if isinstance(value, int):
            return (value,)
        if not isinstance(value, str):
            return value
        ranks: list[int] = []
        for part in value.split(","):
            first, _, last = part.strip().partition("-")
            if not first.isdigit() or (last and not last.isdigit()):
                raise ValueError(f"got {value!r}, need ranks like '0-7' or '0,2-3'")
            ranks.extend(range(int(first), int(last or first) + 1))
        return tuple(ranks)

    @property
    def dp(self) -> int:
        return len(self.ranks) // (self.layout.tp * self.layout.pp * self.layout.cp)


class ActorConfig(RoleConfig):
    # No logits in memory beyond a chunk of tokens; for ppo, cispo and aspo losses.
    fused_head: bool = False
    fused_head_chunk: int = Field(1024, ge=1)  # tokens
    fused_head_fp32_logits: bool = False  # a chunk's logits in fp32 from bf16 operands


class CriticConfig(RoleConfig):
    head_init: Literal["random", "zero"] = "random"  # used when the checkpoint has no value head
    value_clip: float | None = Field(None, gt=0)


class ReferenceConfig(Section):
    """Frozen copy of the actor's starting point; runs on the actor's ranks with the actor's layout."""

    model: Path | None = None  # None: actor.model
