"""One checkpoint of everything: all roles, the rollouts' state, RNG, step; atomic, asynchronous, exact to resume.

run_dir/checkpoints/step-000016/    complete, because it was renamed to this name last
    .metadata, *.distcp, common.pt, metadata.json   Megatron's distributed checkpoint of all roles
    run.json                                        step, roles, rollout state, versions
    rng-00003.safetensors                           generators of rank 3
"""

from __future__ import annotations

import inspect
import json
import logging
import multiprocessing
import os
import random
import re
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase, ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from safetensors.torch import load_file, save_file

from asyppo_megatron.backend import adamw_state
from asyppo_megatron.backend.processes import die_with_parent
from asyppo_megatron.config import CheckpointConfig
from asyppo_megatron.roles.role import Role

logger = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{6,})")
_COMMON = "__common__"


def checkpoint_directory(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:06d}"


def complete_steps(run_dir: Path) -> list[int]:
    """Steps of the complete checkpoints of a run, oldest first."""
    root = run_dir / "checkpoints"
    found = [_NAME.fullmatch(p.name) for p in root.iterdir()] if root.is_dir() else []
    return sorted(int(m[1]) for m in found if m)


def read_run_state(path: Path) -> dict[str, Any]:
    """run.json of a checkpoint.

    Raises:
        ValueError: it is missing or not valid.
    """
    try:
        state: dict[str, Any] = json.loads((path / "run.json").read_text())
        state["step"], state["roles"], state["rollout_state"], state["num_ranks"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as e:
        raise ValueError(f"checkpoint {path}: run.json is not readable: {e!r}; remove this checkpoint") from e
    return state


class _WriterQueue:
    """Results of the processes that write a checkpoint.

    Megatron would make this queue with a manager: a process of its own, which outlives a rank that is killed. The
    writers are forked, so a pipe does.
    """

    def __init__(self) -> None:
        self._queue: Any = multiprocessing.get_context("fork").Queue()

    def put(self, item: Any) -> None:
        self._queue.put(item)

    def get_nowait(self) -> Any:
        return self._queue.get(timeout=60)  # it was put already: only the pipe's feeder may lag


def _write_while_parent_lives(parent: int, write: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    die_with_parent(parent)
    return write(*args, **kwargs)


class Checkpointer:
    """Saves and loads the roles of this rank together with everyone else's. Every method is a world collective.

    Args:
        roles: of this rank.
        all_roles: names of all roles of the run.
    """

    def __init__(
        self,
        run_dir: Path,
        config: CheckpointConfig,
        roles: dict[str, Role],
        all_roles: Sequence[str],
        device: torch.device,
    ):
        self._run_dir, self._config, self._roles = run_dir, config, roles
        self._all_roles, self._device = list(all_roles), device
        self._queue = AsyncCallsQueue()
        filesystem_async._results_queue = _WriterQueue()
        self._validated = False
        self._written: Callable[[], None] | None = None  # a synchronous save that has no name yet
        if dist.get_rank() == 0:
            root = run_dir / "checkpoints"
            root.mkdir(parents=True, exist_ok=True)
            for stale in root.glob(".*.part"):
                shutil.rmtree(stale)  # of a run that was killed while saving
        dist.barrier()

    def save(self, step: int, rollout_state: dict[str, Any]) -> None:
        """Begin to write the state after `step` updates; returns when this rank may change its weights again.

        `finish` gives the checkpoint its name, and must be called for that.

        Args:
            rollout_state: the driver's state after the step's batch; read on rank 0.
        """
        self.finish(wait=True)  # one at a time
        final = checkpoint_directory(self._run_dir, step)
        part = final.with_name(f".{final.name}.part")
        if dist.get_rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
        dist.barrier()
        save_file(_rng_state(), part / f"rng-{dist.get_rank():05d}.safetensors")
        if dist.get_rank() == 0:
            self._write_run_state(part, step, rollout_state)
        state = self._sharded_state(is_loading=False)
        options: dict[str, Any] = {"validate_access_integrity": not self._validated}
        self._validated = True
        if not self._config.async_save:
            dist_checkpointing.save(state, str(part), **options)
            self._written = partial(self._publish, part, final)
            return
        if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
            options["async_strategy"] = "mcore"  # the default of newer versions needs another package
        request = dist_checkpointing.save(state, str(part), async_sharded_save=True, **options)
        if request.async_fn is not None:
            request = request._replace(async_fn=partial(_write_while_parent_lives, os.getpid(), request.async_fn))
        request.add_finalize_fn(lambda: self._publish(part, final))
        self._queue.schedule_async_request(request)

    def finish(self, *, wait: bool) -> None:
        """Complete a save that is written (or wait for it)."""
        if self._written is not None:
            self._written()
            self._written = None
        if self._queue.get_num_unfinalized_calls():
            self._queue.maybe_finalize_async_calls(blocking=wait)

    def close(self) -> None:
        self.finish(wait=True)
        self._queue.close()

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint; the same answer on every rank."""
        steps = complete_steps(self._run_dir) if dist.get_rank() == 0 else []
        newest = torch.tensor([steps[-1] if steps else -1], device=self._device)
        dist.broadcast(newest, 0)
        step = int(newest)
        return None if step < 0 else step

    @torch.no_grad()
    def load(self, step: int) -> dict[str, Any]:
        """Put every role of this rank into the state of a checkpoint; returns its run.json.

        Raises:
            ValueError: the checkpoint is of other roles.
        """
        path = checkpoint_directory(self._run_dir, step)
        run = read_run_state(path)
        if run["roles"] != self._all_roles:
            raise ValueError(
                f"checkpoint {path}: got roles {run['roles']}, need {self._all_roles}; choose another run_dir"
            )
        loaded = dist_checkpointing.load(self._sharded_state(is_loading=True), str(path))
        for name, role in self._roles.items():
            part = loaded[name]
            _restore_common(part, part.pop(_COMMON))
            role.module.load_state_dict(part["model"])
            role.optimizer.load_state_dict(part["optimizer"])
            adamw_state.unshare_steps(role.optimizer)
            role.updates = part["updates"]
        rng = path / f"rng-{dist.get_rank():05d}.safetensors"
        if rng.exists() and run["num_ranks"] == dist.get_world_size():
            _set_rng_state(load_file(rng))
        return run

    def _write_run_state(self, part: Path, step: int, rollout_state: dict[str, Any]) -> None:
        run = {
            "step": step,
            "roles": self._all_roles,
            "rollout_state": rollout_state,
            "num_ranks": dist.get_world_size(),
            "torch": torch.__version__,
        }
        (part / "run.json").write_text(json.dumps(run, indent=1))

    def _publish(self, part: Path, final: Path) -> None:
        """Give a finished checkpoint its name, then drop the oldest; called on every rank after all have written."""
        if dist.get_rank() == 0:
            _sync_tree(part)
            if final.exists():
                shutil.rmtree(final)
            os.rename(part, final)
            for old in complete_steps(self._run_dir)[: -self._config.keep]:
                shutil.rmtree(checkpoint_directory(self._run_dir, old))
        dist.barrier()

    def _sharded_state(self, *, is_loading: bool) -> dict[str, Any]:
        """This rank's part of one state dict of all roles, each under a prefix of its own."""
        return {name: _role_state(name, role, is_loading=is_loading) for name, role in self._roles.items()}


def _role_state(name: str, role: Role, *, is_loading: bool) -> dict[str, Any]:
    role.prepare_state()
    metadata = {
        "distrib_optim_sharding_type": "dp_reshardable",  # fully_reshardable gathers fp32 state on a host
        "dp_cp_group": role.groups.collection.dp_cp,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }
    model = role.module.sharded_state_dict(metadata=metadata)
    state = {
        "model": model,
        "optimizer": role.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata),
        "updates": role.updates,
    }
    # Plain leaves (learning rates, steps) would be written by rank 0 of the world only, and so be lost for roles
    # that live elsewhere: they travel as an object of the role instead.
    common = dict(_take_common(state))
    member = role.groups.layout.ranks.index(dist.get_rank())
    state[_COMMON] = ShardedObject("common", common, (1,), (0,), replica_id=member)
    add_prefix_for_sharding(state, f"{name}.")
    return state


def _take_common(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Any]]:
    """Remove every plain leaf of a sharded state dict; returns them with their places."""
    taken = []
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        value = tree[key]
        if isinstance(value, dict | list) and value:
            taken += _take_common(value, (*path, key))
        elif not isinstance(value, ShardedBase | LocalNonpersistentObject):
            taken.append(((*path, key), value))
            if isinstance(tree, dict):
                del tree[key]
            else:
                tree[key] = None
    return taken


def _restore_common(tree: Any, common: dict[tuple[Any, ...], Any]) -> None:
    """Put plain leaves back to their places."""
    for path, value in common.items():
        node = tree
        for i, key in enumerate(path[:-1]):
            empty: Any = [] if isinstance(path[i + 1], int) else {}
            if isinstance(node, list):
                node.extend([None] * (key + 1 - len(node)))
                if node[key] is None:
                    node[key] = empty
            elif node.get(key) is None:
                node[key] = empty
            node = node[key]
        if isinstance(node, list):
            node.extend([None] * (path[-1] + 1 - len(node)))
        node[path[-1]] = value


def _rng_state() -> dict[str, torch.Tensor]:
    _, words, index, has_gauss, gauss = np.random.get_state()
    _, py_words, py_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(words).astype(np.int64)),
        "numpy_tail": torch.tensor([index, has_gauss, gauss], dtype=torch.float64),
        "python": torch.tensor(py_words, dtype=torch.int64),
        "python_tail": torch.tensor([float("nan") if py_gauss is None else py_gauss], dtype=torch.float64),
    } | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _set_rng_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["torch"])
    index, has_gauss, gauss = state["numpy_tail"].tolist()
    np.random.set_state(("MT19937", state["numpy"].numpy().astype(np.uint32), int(index), int(has_gauss), gauss))
    gauss = float(state["python_tail"])
    random.setstate((3, tuple(state["python"].tolist()), None if gauss != gauss else gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _sync_tree(directory: Path) -> None:
    """Everything of a directory to the disk, before its final name says that it is there."""
    for path in [*directory.rglob("*"), directory]:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
