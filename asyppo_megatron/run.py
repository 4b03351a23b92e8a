"""What one rank holds during a run, and how it is put together and taken apart."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from asyppo_megatron.backend import init_distributed
from asyppo_megatron.backend.scratch import ScratchDirectory
from asyppo_megatron.checkpoint import Checkpointer
from asyppo_megatron.config import Config
from asyppo_megatron.convert.export_hf import export_hf
from asyppo_megatron.observability.metrics import MetricsLog
from asyppo_megatron.observability.progress import Progress
from asyppo_megatron.observability.timing import PhaseTimer
from asyppo_megatron.parallel.seeding import seed_process
from asyppo_megatron.rollout.client import DriverHandle
from asyppo_megatron.rollout.source import DriverSource
from asyppo_megatron.weight_sync.disk import choose_directory, push_to_directory, version_directory
from asyppo_megatron.world import World

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """Everything that one rank holds during a run; `metrics` and `progress` on rank 0 only."""

    config: Config
    world: World
    source: DriverSource
    checkpoints: Checkpointer
    timer: PhaseTimer
    weights_dir: Path
    metrics: MetricsLog | None
    progress: Progress | None
    scratch: ScratchDirectory | None  # owns weights_dir where nothing else does
    rollout_state: dict[str, Any] = field(default_factory=dict)
    evaluated: set[int] = field(default_factory=set)

    def push(self, policy_version: int) -> None:
        """The actor's weights into the engine, under a new version."""
        actor, rank = self.world.actor, dist.get_rank()
        if actor is not None:
            push_to_directory(
                actor.role.module,
                actor.role.spec,
                self.weights_dir,
                policy_version,
                actor.role.groups,
                bucket_bytes=self.config.weight_sync.bucket_mb << 20,
            )
        elif rank == 0:
            self.world.wait_for(f"weights/{policy_version}")
        if actor is not None and actor.role.groups.is_lead and 0 not in self.config.actor.ranks:
            self.world.announce(f"weights/{policy_version}")
        self.source.load_weights(version_directory(self.weights_dir, policy_version), policy_version)

    def evaluate(self, step: int) -> None:
        """Evaluate the engine's weights, which have `step` updates."""
        results = self.source.evaluate(step)
        row = {f"eval/{r['name']}/greedy": r["greedy"] for r in results if r["greedy"] is not None}
        row |= {f"eval/{r['name']}/avg@{r['k']}": r["avg_at_k"] for r in results if r["avg_at_k"] is not None}
        if self.metrics is not None and self.progress is not None:
            self.metrics.log({"step": step, **row})
            self.progress.step({"step": step, **row})


def build_run(config: Config, rank: int, world_size: int, local_rank: int, handle: DriverHandle | None) -> Run:
    """Join the world and build this rank's roles."""
    if world_size != config.num_ranks:
        raise ValueError(f"world: got {world_size} ranks, need {config.num_ranks} (highest rank of any role + 1)")
    device, store = init_distributed(rank, world_size, local_rank, config.collective_timeout_s)
    seed_process(config.seed)
    timer = PhaseTimer(device)
    world = World(config, device, store, timer)
    scratch = None
    if handle is not None:
        size = sum(f.stat().st_size for f in config.actor.model.glob("*.safetensors")) * 2
        weights_dir, scratch = choose_directory(config.weight_sync.dir, config.run_dir, size)
        store.set("weights_dir", str(weights_dir))
        _report_findings(handle.client.hello(), config)
    return Run(
        config=config,
        world=world,
        source=DriverSource(
            handle, config.run_dir, store, device, config.rollout.timeout_s, config.rollout.max_staleness
        ),
        checkpoints=Checkpointer(config.run_dir, config.checkpoint, world.roles, list(config.roles()), device),
        timer=timer,
        weights_dir=Path(store.get("weights_dir").decode()),
        metrics=_metrics_log(config) if rank == 0 else None,
        progress=Progress(config.num_steps) if rank == 0 else None,
        scratch=scratch,
    )


def _report_findings(found: dict[str, Any], config: Config) -> None:
    for name, protection in found["protections"].items():
        logger.info("reward %s runs programs with: %s", name, protection)
    if found["num_skipped"]:
        logger.warning(
            "data.train: skipped %d of %d prompts, longer than rollout.max_prompt_tokens %d",
            found["num_skipped"],
            found["num_skipped"] + found["num_problems"],
            config.rollout.max_prompt_tokens,
        )


def _metrics_log(config: Config) -> MetricsLog:
    return MetricsLog(
        config.run_dir,
        wandb=config.logging.wandb,
        wandb_project=config.logging.wandb_project,
        config=config.model_dump(mode="json"),
    )


def export_models(run: Run) -> None:
    """Hugging Face checkpoints of all trained roles into run_dir/hf/<role>."""
    for name, role_config in run.config.roles().items():
        if name == "actor" and run.config.num_steps and not run.config.trains_policy:
            continue  # value pre-training: it is still the model that it came from
        role = run.world.roles.get(name)
        if role is not None:
            export_hf(
                role.module,
                role.spec,
                run.config.run_dir / "hf" / name,
                role_config.model,
                role.groups,
                role="actor" if name == "actor" else "critic",
                force=True,
            )


def release(run: Run) -> None:
    """Free what this rank holds outside its own memory; no collectives, so it serves after an error too."""
    if run.progress is not None:
        run.progress.close()
    if run.metrics is not None:
        run.metrics.close()
    if run.scratch is not None:
        run.scratch.close()
    elif dist.get_rank() == 0 and run.config.weight_sync.dir is None:
        shutil.rmtree(run.weights_dir, ignore_errors=True)
