"""The training loop, and one rank's way into it."""

from __future__ import annotations

import logging
import os
import signal
import time
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from asyppo_megatron.backend import peak_memory_gb
from asyppo_megatron.config import Config, dump_config
from asyppo_megatron.observability.board import Slot, StatusBoard
from asyppo_megatron.observability.logs import configure_logging
from asyppo_megatron.observability.metrics import read_metrics
from asyppo_megatron.observability.report import learning_curve
from asyppo_megatron.parallel import exchange
from asyppo_megatron.rollout.client import start_driver
from asyppo_megatron.run import Run, build_run, export_models, release
from asyppo_megatron.types import PackedBatch, RunError, Targets

logger = logging.getLogger(__name__)
_COMPUTE = ("actor_logprobs", "reference_logprobs", "critic_update", "critic_values", "actor_update")


def train(run: Run, first_step: int) -> bool:
    """The loop: iteration s turns the weights of version s into version s + 1 and logs that as step s + 1.

    Returns:
        Whether all steps are done; otherwise a signal has ended the loop, with a checkpoint of the last step begun.
    """
    config, source = run.config, run.source
    run.push(first_step)
    if is_eval_due(run, first_step):
        run.evaluate(first_step)
    if first_step < config.num_steps:
        source.start(first_step, first_step)
    for step in range(first_step, config.num_steps):
        began, cpu = time.perf_counter(), time.process_time()
        run.slot.begin_step(step + 1)
        with run.timer.phase("checkpoint"):
            run.checkpoints.finish(wait=False)  # only now that the metrics of its step are logged
        with run.timer.phase("rollouts", deadline_s=config.rollout.timeout_s + config.collective_timeout_s):
            batch = source.next_batch(step, partial(run.push_again, step))
            run.take_devices(step)
        if batch is None:  # the weights are those of the step before: nothing of this one is lost but time
            save_if_new(run, step)
            return False
        local = run.world.evaluate(batch)
        with run.timer.phase("exchange"):
            scores = run.world.exchange(batch, local)
        with run.timer.phase("targets"):
            targets = run.world.targets(batch, scores)
        run.world.update(batch, targets, scores)
        with run.timer.phase("metrics"):
            row, stops = step_metrics(run, batch, targets, time.process_time() - cpu)
        if stops:
            save_if_new(run, step + 1)
            log_step(run, row, time.perf_counter() - began)
            return False
        is_saved = run.is_colocated and is_save_due(run, step + 1)
        if is_saved:  # the push moves roles to the host
            with run.timer.phase("checkpoint"):
                save(run, step + 1)
        with run.timer.phase("weight_sync"):
            run.push(step + 1)
        last = step + 1 == config.num_steps
        is_eval = is_eval_due(run, step + 1)
        if not is_eval and not last:
            source.start(step + 1, step + 1)
        with run.timer.phase("checkpoint"):
            if is_save_due(run, step + 1) and not is_saved:
                save(run, step + 1)
        log_step(run, row, time.perf_counter() - began)
        if is_eval:
            run.evaluate(step + 1)
            if not last:
                source.start(step + 1, step + 1)
    return True


def is_eval_due(run: Run, step: int) -> bool:
    """Whether weights with `step` updates are to be evaluated (and were not before an interruption)."""
    config = run.config
    if not config.eval.every or step in run.evaluated:
        return False
    return config.eval.at_start if step == 0 else step % config.eval.every == 0 or step == config.num_steps


def step_metrics(run: Run, batch: PackedBatch, targets: Targets, cpu_seconds: float) -> tuple[dict[str, Any], bool]:
    """Metrics of a step, on every rank, and whether any rank was asked to stop.

    Raises before weights with NaN reach an engine or a checkpoint.
    """
    roles, (cpu, stops) = run.world.metrics(batch.step + 1, [cpu_seconds, float(run.slot.stop_requested)])
    manifest = run.source.manifest
    run.rollout_state = manifest.get("rollout_state_after", {})
    statistics = dict(manifest.get("statistics", {}))
    statuses = statistics.pop("reward_status", {})
    measured = torch.stack([v.double() for v in targets.metrics.values()]).tolist()  # one host read
    check_mismatch(batch.step + 1, roles | dict(zip(targets.metrics, measured, strict=True)), run.config)
    row = (
        {"step": batch.step + 1}
        | statistics
        | {f"reward_status/{name}": count for name, count in statuses.items()}
        | roles
        | dict(zip(targets.metrics, measured, strict=True))
        | {"cpu_seconds/ranks": cpu}
        | ({"memory/driver_gb": manifest["memory_gb"]} if "memory_gb" in manifest else {})
    )
    return row, stops > 0


def check_mismatch(step: int, measured: dict[str, float], config: Config) -> None:
    """Stop before weights that learned from it are used or saved, when engines and trainer disagree too much.

    Raises:
        RunError: on every rank.
    """
    limit, found = config.rollout.max_mismatch, measured.get("mismatch_mean", 0.0)
    if limit is not None and found > limit:
        raise RunError(
            f"step {step}: engines and trainer disagree by {found:.4g} nats a token in the mean (largest "
            f"{measured.get('mismatch_max', found):.4g}, k3 KL {measured['mismatch_k3_kl']:.4g}), more than "
            f"rollout.max_mismatch {limit:.4g}; stopped before these weights were used or saved. Look for engines with "
            "other weights, another precision, or too stale rollouts; or raise the limit"
        )


def is_save_due(run: Run, step: int) -> bool:
    """Whether to save after `step` updates."""
    config = run.config.checkpoint
    return bool(config.every and step % config.every == 0) or (config.at_end and step == run.config.num_steps)


def save(run: Run, step: int) -> None:
    """Begin a checkpoint; it is completed at the start of a later step, or after the last."""
    config = run.config.checkpoint
    run.checkpoints.save(step, run.rollout_state)
    if config.every:
        # Resuming from the oldest kept checkpoint replays the journal from there on; this one is not complete yet.
        run.source.prune(step - config.every * max(config.keep - 1, 1))


def save_if_new(run: Run, step: int) -> None:
    """Begin a checkpoint of `step` updates before the run stops, unless there is one."""
    with run.timer.phase("checkpoint"):
        run.checkpoints.finish(wait=True)
        if step and run.checkpoints.latest() != step:
            save(run, step)


def log_step(run: Run, row: dict[str, Any], seconds: float) -> None:
    """Phase times of all ranks (each phase's slowest rank) and the row into the log."""
    times = run.timer.read()
    compute = sum(times.get(f"seconds/{name}", 0.0) for name in _COMPUTE[:-1])
    update = times.get("seconds/actor_update", 0.0)
    slots = [f"{unit}/{name}" for unit in ("seconds", "tokens") for name in _COMPUTE]
    peak = run.timer.peak_gb or peak_memory_gb(run.world.device)
    own = [times.get(name, 0.0) for name in slots] + [compute, update, peak]
    worst = exchange.max_vector(torch.tensor(own, dtype=torch.float64, device=run.world.device))
    if run.metrics is None or run.progress is None:
        return
    row |= times | {name: t for name, t in zip(slots, worst, strict=False) if t}
    row["memory/peak_gb"] = worst[-1]
    generation = float(row.get("generate_seconds", 0.0))
    row["seconds/generation"] = generation
    row["seconds/step"] = seconds
    # Outside model compute and generation, on the critical path: what the slowest ranks' models do not explain.
    waited = min(generation, times["seconds/rollouts"])  # generation may have run beside the last step's save
    row["seconds/other"] = max(0.0, seconds - waited - worst[-3] - worst[-2])
    row["tokens_per_second"] = row.get("tokens/actor_update", 0) / seconds
    run.metrics.log(row)
    run.progress.step(row)


def run_rank(config: Config, rank: int, world_size: int, local_rank: int, slot: Slot) -> bool:
    """One rank of a training run, from start (or the last checkpoint) to the end.

    Returns:
        Whether the run is complete; otherwise a signal has stopped it.
    """
    run_dir = config.run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    configure_logging(run_dir, f"rank-{rank:05d}", level=config.logging.level, rank=rank)
    handle = start_driver(config, run_dir) if rank == 0 else None  # forks: before any thread or device exists
    try:
        run = build_run(config, rank, world_size, local_rank, handle, slot)
        try:
            is_complete = _train_and_export(run)
            run.checkpoints.close()  # a collective, so only where every rank gets here
        finally:
            release(run)
        dist.destroy_process_group()
    finally:
        if handle is not None:
            handle.close()
    return is_complete


def _train_and_export(run: Run) -> bool:
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
    is_complete = train(run, first)
    with run.timer.phase("checkpoint"):
        run.checkpoints.finish(wait=True)
    if not is_complete:
        logger.info("stopped as asked; the checkpoint is complete")
        return False
    if config.checkpoint.export_hf:
        with run.timer.phase("export"):
            run.take_devices(config.num_steps)
            export_models(run)
    if rank == 0:
        learning_curve(config.run_dir)
    dist.barrier()
    return True


def main_rank(config: Config, slot: Slot | None = None) -> bool:
    """Entry of a process that torchrun or `launch.local` started as one rank; whether the run is complete.

    Args:
        slot: of the launcher's board; None under torchrun, where a signal reaches the rank itself.
    """
    env = os.environ
    if slot is None:
        slot = StatusBoard(1).slot(0)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda *_: slot.request_stop())
    return run_rank(config, int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", env["RANK"])), slot)
