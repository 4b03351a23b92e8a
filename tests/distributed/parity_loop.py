"""The training loop over fixed batches instead of a rollout driver, for tests of the ranks alone. Not a test file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from parity_models import make_batch

from asyppo_megatron.checkpoint import Checkpointer
from asyppo_megatron.config import Config
from asyppo_megatron.observability.board import StatusBoard
from asyppo_megatron.observability.timing import PhaseTimer
from asyppo_megatron.run import Run
from asyppo_megatron.types import PackedBatch
from asyppo_megatron.world import World


class FixedSource:
    """The same batch every step; `before` runs first."""

    manifest: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, batch: PackedBatch, before: Callable[[int], None] | None = None):
        self.batch, self.before = batch, before

    def next_batch(self, step: int, push: Callable[[], None]) -> PackedBatch:
        if self.before is not None:
            self.before(step)
        return replace(self.batch, step=step, policy_version=step)

    def _nothing(self, *_: Any) -> None:
        pass

    start = load_weights = prune = restore = _nothing


def build_run(config: Config, device: torch.device, store: Any) -> Run:
    """What `run.build_run` makes, without a driver, metrics file or progress line."""
    timer = PhaseTimer(device)
    weights = Path(config.run_dir) / "weights"
    if dist.get_rank() == 0:
        weights.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    world = World(config, device, store, timer)
    batch = make_batch(config.rollout.prompts_per_step, config.rollout.responses_per_prompt, seed=6)
    return Run(
        config=config,
        world=world,
        source=FixedSource(batch),  # type: ignore[arg-type]
        checkpoints=Checkpointer(config.run_dir, config.checkpoint, world.roles, list(config.roles()), device),
        timer=timer,
        weights_dir=weights,
        metrics=None,
        progress=None,
        scratch=None,
        slot=StatusBoard(1).slot(0),
    )
