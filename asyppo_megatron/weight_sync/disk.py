"""Weights to engines through a directory that they can read: the transport that works everywhere."""

from __future__ import annotations

import json
import logging
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from asyppo_megatron.backend.scratch import SHARED_MEMORY, ScratchDirectory
from asyppo_megatron.convert.export import Bucket, hf_stream, stage_tensors
from asyppo_megatron.convert.stages import leads, together, write_stage, write_together
from asyppo_megatron.models.spec import ModelSpec
from asyppo_megatron.types import RunError

if TYPE_CHECKING:
    from asyppo_megatron.parallel.process_groups import RoleGroups

log = logging.getLogger(__name__)

MANIFEST = "weights.json"
_ROOM = 2.5  # the new version is written while the last one still lies there, and something must be left
_VERSION = re.compile(r"v\d{8}")


class PushError(RunError):
    """Weights could not be written."""


def choose_directory(config_dir: Path | None, run_dir: Path, bytes_needed: int) -> tuple[Path, ScratchDirectory | None]:
    """Where to push weights: the configured directory, else shared memory with room, else the run directory.

    Called on one rank; the others are told.

    Args:
        bytes_needed: size of one version of the weights.

    Returns:
        The directory, and in shared memory its owner, to be closed at the end.
    """
    if config_dir is not None:
        config_dir.mkdir(parents=True, exist_ok=True)
        return config_dir, None
    if SHARED_MEMORY.is_dir():
        free = shutil.disk_usage(SHARED_MEMORY).free
        if free >= _ROOM * bytes_needed:
            scratch = ScratchDirectory(SHARED_MEMORY, "weights")
            return scratch.path, scratch
        log.info("weight sync: %s has %d bytes free, %d needed; using %s", SHARED_MEMORY, free, bytes_needed, run_dir)
    directory = run_dir / "weights"
    directory.mkdir(parents=True, exist_ok=True)
    return directory, None


def version_directory(directory: Path, policy_version: int) -> Path:
    return directory / f"v{policy_version:08d}"


def push_to_directory(
    model: nn.Module,
    spec: ModelSpec,
    directory: Path,
    policy_version: int,
    groups: RoleGroups,
    *,
    dtype: torch.dtype | None = None,
    bucket_bytes: int = 256 << 20,
    observe: Callable[[Bucket], None] | None = None,
) -> Path:
    """Write one version of the actor's weights as safetensors files, one a pipeline stage, and drop the others.

    Collective over `groups.role`: every rank calls it; tp rank 0 of each stage of the first dp index writes. The
    version's directory appears when all files and its manifest are there.

    Args:
        observe: sees every bucket that this rank writes.

    Returns:
        The version's directory.

    Raises:
        PushError: the disk is full (on every rank; nothing half-written is left, the last version stays).
    """
    target = version_directory(directory, policy_version)
    device = next(model.parameters()).device

    def write(partial: Path) -> None:
        stream = hf_stream(model, spec, tp_group=groups.collection.tp, dtype=dtype, bucket_bytes=bucket_bytes)
        stream = _watched(stream, observe) if observe is not None else stream
        plan = stage_tensors(model, spec, "actor", dtype) if groups.at.tp == 0 else {}
        write_stage(stream, plan, partial, f"stage-{groups.at.pp:05d}", max_file_bytes=sys.maxsize, sync=False)

    def finish(partial: Path) -> None:
        files = sorted(f.name for f in partial.glob("*.safetensors"))
        (partial / MANIFEST).write_text(json.dumps({"policy_version": policy_version, "files": files}))

    try:
        # Not durable: after a power loss the weights are pushed again.
        write_together(target, groups, device, write, finish, force=True, durable=False)
        together(groups.role, device, lambda: _remove_others(target) if leads(groups) else None)
    except OSError as e:
        raise PushError(
            f"weight sync of policy version {policy_version}: cannot write to {directory}: {e}; what lay there "
            "before is intact. Free space, or set weight_sync.dir to a larger disk"
        ) from e
    return target


def _watched(stream: Iterator[Bucket], observe: Callable[[Bucket], None]) -> Iterator[Bucket]:
    for bucket in stream:
        observe(bucket)
        yield bucket


def _remove_others(target: Path) -> None:
    """Remove other versions, and what killed pushes left behind."""
    for item in target.parent.iterdir():
        name = item.name.removeprefix(".").removesuffix(".partial").removesuffix(".old")
        if item != target and _VERSION.fullmatch(name):
            shutil.rmtree(item)
