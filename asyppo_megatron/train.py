"""The training loop, and one rank's way into it."""

from __future__ import annotations

import logging
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from asyppo_megatron.backend import init_distributed, peak_memory_gb
from asyppo_megatron.checkpoint import Checkpointer
from asyppo_megatron.config import Config, dump_config
from asyppo_megatron.convert.export_hf import export_hf
from asyppo_megatron.observability.logs import configure_logging
from asyppo_megatron.observability.metrics import MetricsLog, read_metrics
from asyppo_megatron.observability.progress import Progress
from asyppo_megatron.observability.report import learning_curve
from asyppo_megatron.observability.timing import PhaseTimer
from asyppo_megatron.parallel import exchange
from asyppo_megatron.parallel.seeding import seed_process
from asyppo_megatron.rollout.client import start_driver
from asyppo_megatron.rollout.source import DriverSource
from asyppo_megatron.types import PackedBatch, Targets
from asyppo_megatron.weight_sync.disk import choose_directory, push_to_directory
from asyppo_megatron.world import World

logger = logging.getLogger(__name__)
_COMPUTE = ("actor_logprobs", "reference_logprobs", "critic_update", "critic_values", "actor_update")


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
        self.source.load_weights(self.weights_dir / f"v{policy_version:08d}", policy_version)

    def evaluate(self, step: int) -> None:
        """Evaluate the engine's weights, which have `step` updates."""
        results = self.source.evaluate(step)
        row = {f"eval/{r['name']}/greedy": r["greedy"] for r in results if r["greedy"] is not None}
        row |= {f"eval/{r['name']}/avg@{r['k']}": r["avg_at_k"] for r in results if r["avg_at_k"] is not None}
        if self.metrics is not None and self.progress is not None:
            self.metrics.log({"step": step, **row})
            self.progress.step({"step": step, **row})


def train(run: Run, first_step: int) -> None:
    """The loop: iteration s turns the weights of version s into version s + 1 and logs that as step s + 1."""
    config, source = run.config, run.source
    run.push(first_step)
    if is_eval_due(run, first_step):
        run.evaluate(first_step)
    if first_step < config.num_steps:
        source.start(first_step, first_step)
    for step in range(first_step, config.num_steps):
        began, cpu = time.perf_counter(), time.process_time()
        with run.timer.phase("rollouts"):
            batch = source.next_batch(step)
        local = run.world.evaluate(batch)
        with run.timer.phase("exchange"):
            scores = run.world.exchange(batch, local)
        with run.timer.phase("targets"):
            targets = run.world.targets(batch, scores)
        run.world.update(batch, targets, scores)
        with run.timer.phase("metrics"):
            row = step_metrics(run, batch, targets, time.process_time() - cpu)
        with run.timer.phase("weight_sync"):
            run.push(step + 1)
        last = step + 1 == config.num_steps
        is_eval = is_eval_due(run, step + 1)
        if not is_eval and not last:
            source.start(step + 1, step + 1)
        with run.timer.phase("checkpoint"):
            save_if_due(run, step + 1, last)
        log_step(run, row, time.perf_counter() - began)
        if is_eval:
            run.evaluate(step + 1)
            if not last:
                source.start(step + 1, step + 1)


def is_eval_due(run: Run, step: int) -> bool:
    """Whether weights with `step` updates are to be evaluated (and were not before an interruption)."""
    config = run.config
    if not config.eval.every or step in run.evaluated:
        return False
    return config.eval.at_start if step == 0 else step % config.eval.every == 0 or step == config.num_steps


def step_metrics(run: Run, batch: PackedBatch, targets: Targets, cpu_seconds: float) -> dict[str, Any]:
    """Metrics of a step, on every rank; raises before weights with NaN reach an engine or a checkpoint."""
    roles, (cpu,) = run.world.metrics(batch.step + 1, [cpu_seconds])
    manifest = run.source.manifest
    run.rollout_state = manifest.get("rollout_state_after", {})
    statistics = dict(manifest.get("statistics", {}))
    statuses = statistics.pop("reward_status", {})
    measured = torch.stack([v.double() for v in targets.metrics.values()]).tolist()  # one host read
    return (
        {"step": batch.step + 1}
        | statistics
        | {f"reward_status/{name}": count for name, count in statuses.items()}
        | roles
        | dict(zip(targets.metrics, measured, strict=True))
        | {"cpu_seconds/ranks": cpu}
    )


def save_if_due(run: Run, step: int, last: bool) -> None:
    """Save after `step` updates when the configuration asks for it; complete an earlier asynchronous save."""
    config = run.config.checkpoint
    if (config.every and step % config.every == 0) or (last and config.at_end):
        run.checkpoints.save(step, run.rollout_state, wait=last)
        run.source.prune(step - config.every * config.keep if config.every else 0)
    else:
        run.checkpoints.finish(wait=False)


def log_step(run: Run, row: dict[str, Any], seconds: float) -> None:
    """Phase times of all ranks (each phase's slowest rank) and the row into the log."""
    times = run.timer.read()
    compute = sum(times.get(f"seconds/{name}", 0.0) for name in _COMPUTE[:-1])
    update = times.get("seconds/actor_update", 0.0)
    slots = [f"seconds/{name}" for name in _COMPUTE]
    own = [times.get(name, 0.0) for name in slots] + [compute, update, peak_memory_gb(run.world.device)]
    worst = exchange.max_vector(torch.tensor(own, dtype=torch.float64, device=run.world.device))
    if run.metrics is None or run.progress is None:
        return
    row |= times | {name: t for name, t in zip(slots, worst, strict=False) if t}
    row["memory/peak_gb"] = worst[-1]
    generation = float(row.get("generate_seconds", 0.0))
    row["seconds/generation"] = generation
    row["seconds/step"] = seconds
    # Outside model compute and generation, on the critical path: what the slowest ranks' models do not explain.
    row["seconds/other"] = max(0.0, seconds - generation - worst[-3] - worst[-2])
    row["tokens_per_second"] = row.get("tokens/actor_update", 0) / seconds
    run.metrics.log(row)
    run.progress.step(row)


def run_rank(config: Config, rank: int, world_size: int, local_rank: int) -> None:
    """One rank of a training run, from start (or the last checkpoint) to the end."""
    run_dir = config.run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    configure_logging(run_dir, f"rank-{rank:05d}", level=config.logging.level, rank=rank)
    handle = start_driver(config, run_dir) if rank == 0 else None  # forks: before any thread or device exists
    try:
        run = build_run(config, rank, world_size, local_rank, handle)
        try:
            _train_and_export(run)
        finally:
            _close(run)
    finally:
        if handle is not None:
            handle.close()


def build_run(config: Config, rank: int, world_size: int, local_rank: int, handle: Any) -> Run:
    """Join the world and build this rank's roles."""
    if world_size != config.num_ranks:
        raise ValueError(f"world: got {world_size} ranks, need {config.num_ranks} (highest rank of any role + 1)")
    device, store = init_distributed(rank, world_size, local_rank, config.collective_timeout_s)
    seed_process(config.seed)
    timer = PhaseTimer(device)
    world = World(config, device, store, timer)
    if rank == 0:
        size = sum(f.stat().st_size for f in config.actor.model.glob("*.safetensors")) * 2
        store.set("weights_dir", str(choose_directory(config.weight_sync.dir, config.run_dir, size)))
        handle.client.hello()
    return Run(
        config=config,
        world=world,
        source=DriverSource(handle, config.run_dir, store, device, config.rollout.timeout_s),
        checkpoints=Checkpointer(config.run_dir, config.checkpoint, world.roles, list(config.roles()), device),
        timer=timer,
        weights_dir=Path(store.get("weights_dir").decode()),
        metrics=_metrics_log(config) if rank == 0 else None,
        progress=Progress(config.num_steps) if rank == 0 else None,
    )


def _metrics_log(config: Config) -> MetricsLog:
    return MetricsLog(
        config.run_dir,
        wandb=config.logging.wandb,
        wandb_project=config.logging.wandb_project,
        config=config.model_dump(mode="json"),
    )


def _train_and_export(run: Run) -> None:
    config, rank = run.config, dist.get_rank()
    latest = run.checkpoints.latest()
    first = 0
    if latest is not None:
        state = run.checkpoints.load(latest)
        first, run.rollout_state = latest, state["rollout_state"]
        run.source.restore(state["rollout_state"])
        logger.info("resumed from the checkpoint after step %d", latest)
    if rank == 0:
        assert run.metrics is not None
        run.metrics.truncate_after(first)
        rows = read_metrics(run.metrics.path)
        run.evaluated = {row["step"] for row in rows if any(name.startswith("eval/") for name in row)}
        (config.run_dir / "config.yaml").write_text(dump_config(config))
    train(run, first)
    run.checkpoints.finish(wait=True)
    if config.checkpoint.export_hf:
        export_models(run)
    if rank == 0:
        learning_curve(config.run_dir)
    dist.barrier()


def export_models(run: Run) -> None:
    """Hugging Face checkpoints of all trained roles into run_dir/hf/<role>."""
    for name, role_config in run.config.roles().items():
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


def _close(run: Run) -> None:
    run.checkpoints.close()
    if run.progress is not None:
        run.progress.close()
    if run.metrics is not None:
        run.metrics.close()
    if dist.get_rank() == 0 and run.config.weight_sync.dir is None:
        shutil.rmtree(run.weights_dir, ignore_errors=True)


def main_rank(config: Config) -> None:
    """Entry of a process that torchrun, srun or `launch.local` started as one rank."""
    env = os.environ
    run_rank(config, int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", env["RANK"])))
