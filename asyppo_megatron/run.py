"""What one rank holds during a run, and how it is put together and taken apart."""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch._C import _distributed_c10d

from asyppo_megatron.backend import empty_cache, init_distributed
from asyppo_megatron.backend.scratch import ScratchDirectory
from asyppo_megatron.checkpoint import Checkpointer
from asyppo_megatron.config import Config
from asyppo_megatron.convert.export_hf import export_hf
from asyppo_megatron.observability.board import Slot, answer_questions, pending_collective
from asyppo_megatron.observability.metrics import MetricsLog
from asyppo_megatron.observability.progress import Progress
from asyppo_megatron.observability.timing import PhaseTimer
from asyppo_megatron.parallel.layout import ParallelLayout
from asyppo_megatron.parallel.seeding import seed_process
from asyppo_megatron.roles.offload import MOVED, Offloader, Part
from asyppo_megatron.rollout.client import DriverHandle
from asyppo_megatron.rollout.source import DriverSource
from asyppo_megatron.weight_sync.devices import engine_gpus
from asyppo_megatron.weight_sync.disk import choose_directory, push_to_directory, version_directory
from asyppo_megatron.weight_sync.engines import EngineTarget
from asyppo_megatron.weight_sync.orders import SyncOptions
from asyppo_megatron.weight_sync.push import EngineSync
from asyppo_megatron.world import World

logger = logging.getLogger(__name__)
_WATCHED = 0.8  # of the collectives' timeout: the launcher is to ask the ranks while they still wait


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
    slot: Slot  # of the launcher's board
    movers: dict[str, tuple[Offloader, tuple[Part, ...]]] = field(default_factory=dict)  # by role, and what they move
    engines: EngineSync | None = None  # on the actor's ranks, where engines are not in the driver
    synced: dict[str, Any] = field(default_factory=dict)  # of the last weight sync
    rollout_state: dict[str, Any] = field(default_factory=dict)
    evaluated: set[int] = field(default_factory=set)

    def push(self, policy_version: int) -> None:
        """The actor's weights into the engines, under a new version."""
        if self.config.rollout.engine == "sglang":
            self._push_to_engines(policy_version)
        else:
            self._push_to_driver(policy_version)

    def push_again(self, policy_version: int) -> None:
        """The version that engines have lost, while the ranks wait for a batch: the actor still has it.

        Colocated engines leave room for the actor's weights, as at the first push.
        """
        with self.timer.phase("weight_sync"):
            if self.is_colocated and "actor" in self.movers:
                self.movers["actor"][0].reload(["weights"])
            self.push(policy_version)

    def _push_to_engines(self, policy_version: int) -> None:
        """The actor's ranks bring them; rank 0 tells the driver before and after."""
        rank = dist.get_rank()
        self._move_out(but_actor_weights=True)
        if rank == 0:
            urls = self.source.begin_update(policy_version)
            self.world.store.set(_engines_key(policy_version), json.dumps(urls))
        if self.engines is not None:
            actor = self.world.actor
            assert actor is not None
            self.synced = self.engines.push(actor.role.module, policy_version)
        self._move_out()
        if self.engines is not None:
            if self.is_colocated:
                self.engines.wake()
            if self.engines.is_lead and 0 not in self.config.actor.ranks:
                self.world.announce(f"weights/{policy_version}")
        elif rank == 0:
            self.world.wait_for(f"weights/{policy_version}")
        if rank == 0:
            on_disk = self.config.weight_sync.transport == "disk"
            path = version_directory(self.weights_dir, policy_version) if on_disk else None
            self.source.end_update(policy_version, path)
            self.world.store.delete_key(_engines_key(policy_version))  # the version may be pushed again

    @property
    def is_colocated(self) -> bool:
        """Whether engines generate on the devices of the ranks, in turn with training."""
        rollout = self.config.rollout
        return rollout.engine == "sglang" and rollout.sglang.placement == "colocated"

    def take_devices(self, step: int) -> None:
        """Begin to train on devices that colocated engines have used: not before they have let go of their memory."""
        if not self.is_colocated:
            return
        key = f"sync/devices/{step}"
        if self.engines is not None:
            self.engines.release()
            if self.engines.is_lead:
                self.world.store.set(key, "free")
                self.world.store.delete_key(f"sync/devices/{step - 2}")
        self.world.store.wait([key])
        for mover, _ in self.movers.values():
            mover.reload()

    def _move_out(self, *, but_actor_weights: bool = False) -> None:
        """What the configuration wants on the host while engines generate; on return every rank has done it."""
        if not self.is_colocated:
            return
        for name, (mover, parts) in self.movers.items():
            mover.offload(p for p in parts if not (but_actor_weights and name == "actor" and p == "weights"))
        empty_cache(self.world.device)
        dist.barrier()

    def _push_to_driver(self, policy_version: int) -> None:
        """Through a directory that the driver reads."""
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


def build_run(
    config: Config, rank: int, world_size: int, local_rank: int, handle: DriverHandle | None, slot: Slot
) -> Run:
    """Join the world and build this rank's roles."""
    if world_size != config.num_ranks:
        raise ValueError(f"world: got {world_size} ranks, need {config.num_ranks} (highest rank of any role + 1)")
    device, store = init_distributed(rank, world_size, local_rank, config.collective_timeout_s)
    answer_questions(slot, _pending_collective)
    seed_process(config.seed)
    patience = _WATCHED * config.collective_timeout_s
    timer = PhaseTimer(device, slot, patience)
    world = World(config, device, store, timer)
    scratch = None
    if handle is not None:
        size = sum(f.stat().st_size for f in config.actor.model.glob("*.safetensors")) * 2
        chosen, scratch = choose_directory(_shared_directory(config), config.run_dir, size)
        store.set("weights_dir", str(chosen))
        store.set("sync/name", f"asyppo-{secrets.token_hex(4)}")  # engines may know groups of other runs
        _report_findings(handle.client.hello(), config)
    weights_dir = Path(store.get("weights_dir").decode())
    return Run(
        config=config,
        world=world,
        source=DriverSource(
            handle,
            config.run_dir,
            store,
            device,
            config.rollout.timeout_s,
            slot,
            patience,
            config.rollout.max_staleness,
        ),
        checkpoints=Checkpointer(config.run_dir, config.checkpoint, world.roles, list(config.roles()), device),
        timer=timer,
        weights_dir=weights_dir,
        metrics=_metrics_log(config) if rank == 0 else None,
        progress=Progress(config.num_steps) if rank == 0 else None,
        scratch=scratch,
        slot=slot,
        engines=_engine_sync(config, world, weights_dir),
        movers=_movers(config, world),
    )


def _movers(config: Config, world: World) -> dict[str, tuple[Offloader, tuple[Part, ...]]]:
    """What moves the roles of this rank to the host and back."""
    movers = {
        name: (Offloader(role.module, role.ddp, role.optimizer), MOVED[config.roles()[name].offload])
        for name, role in world.roles.items()
    }
    if world.reference is not None:
        parts = MOVED[config.actor.offload]
        movers["reference"] = (Offloader(world.reference.model), tuple(p for p in parts if p == "weights"))
    return movers


def _engine_sync(config: Config, world: World, weights_dir: Path) -> EngineSync | None:
    """What brings the actor's weights to SGLang servers; None outside the actor and with the embedded engine."""
    if config.rollout.engine != "sglang" or world.actor is None:
        return None
    sync, engines = config.weight_sync, config.rollout.sglang
    options = SyncOptions(
        transport=sync.transport,
        bucket_bytes=sync.bucket_mb << 20,
        checksum=sync.checksum,
        timeout_s=sync.timeout_s,
        pause_mode="in_place" if config.rollout.on_update == "carry" else "retract",
        directory=weights_dir,
        colocated=engines.placement == "colocated",
    )

    def targets(policy_version: int) -> list[EngineTarget]:
        urls = json.loads(world.store.get(_engines_key(policy_version)))
        gpus = engine_gpus(config)
        beside = engines.placement == "colocated" and world.device.type == "cpu"
        return [EngineTarget(url, gpus.get(url, ()), colocated=beside) for url in urls]

    role = world.actor.role
    name = world.store.get("sync/name").decode()
    return EngineSync(role.groups, role.spec, world.store, world.device, options, targets=targets, name=name)


def _engines_key(policy_version: int) -> str:
    return f"sync/engines/{policy_version}"


def _shared_directory(config: Config) -> Path | None:
    """Where to push weights: as configured, and never into one node's memory what ranks of several nodes write."""
    if config.weight_sync.dir is not None:
        return config.weight_sync.dir
    layout = ParallelLayout.of(config.actor)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", config.num_ranks))
    writers = [rank for rank in layout.ranks if layout.coordinates(rank).dp == 0]
    return config.run_dir / "weights" if max(writers) >= here else None


def _pending_collective() -> str:
    """The collective that this rank waits in, from torch's flight recorder."""
    on_gpu = dist.is_initialized() and dist.get_backend() == "nccl"
    record = _distributed_c10d._dump_nccl_trace_json if on_gpu else _distributed_c10d._dump_fr_trace_json
    try:
        return pending_collective(record())
    except (KeyError, ValueError):  # another version's format
        return "a collective that torch's flight recorder describes in another format"


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
    if run.engines is not None:
        run.engines.close()
    if run.scratch is not None:
        run.scratch.close()
    elif dist.get_rank() == 0 and run.config.weight_sync.dir is None:
        shutil.rmtree(run.weights_dir, ignore_errors=True)
