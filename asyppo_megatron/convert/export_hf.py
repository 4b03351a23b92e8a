"""A trained model to a Hugging Face checkpoint, all pipeline stages writing at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from asyppo_megatron.convert.export import hf_stream, stage_tensors
from asyppo_megatron.convert.hf_io import MAX_FILE_BYTES, file_name, write_index, write_sidecars
from asyppo_megatron.convert.safetensors_file import read_header
from asyppo_megatron.convert.stages import write_stage, write_together
from asyppo_megatron.convert.table import Role
from asyppo_megatron.models.spec import ModelSpec

if TYPE_CHECKING:
    from asyppo_megatron.parallel.process_groups import RoleGroups


def export_hf(
    model: nn.Module,
    spec: ModelSpec,
    target: Path,
    source: Path,
    groups: RoleGroups,
    *,
    role: Role = "actor",
    dtype: torch.dtype | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    force: bool = False,
) -> None:
    """Write `target` from all ranks of a role; it appears complete or not at all.

    Collective over `groups.role`: every rank calls it. The first dp index writes, each stage its own files, into
    one file system that all of them see.

    Args:
        source: Hugging Face directory whose config and tokenizer are carried along.
        dtype: dtype of the tensors; None keeps each parameter's.
        force: replace an existing target.

    Raises:
        ValueError: the target exists.
        OSError: the disk is full or not shared; on every rank, with the reason on the rank that met it.
    """
    tensors = stage_tensors(model, spec, role, dtype)

    def write(partial: Path) -> None:
        stream = hf_stream(model, spec, tp_group=groups.collection.tp, role=role, dtype=dtype)
        plan = tensors if groups.at.tp == 0 else {}
        write_stage(stream, plan, partial, f"stage-{groups.at.pp:05d}", max_file_bytes=max_file_bytes, sync=True)

    def finish(partial: Path) -> None:
        _name_files(partial)
        write_sidecars(source, partial, role, next(iter(tensors.values())).dtype)

    device = next(model.parameters()).device
    write_together(target, groups, device, write, finish, force=force, durable=True)


def _name_files(directory: Path) -> None:
    """Give the stages' files their final names, in order, and write the index."""
    files = sorted(directory.glob("stage-*.safetensors"))
    headers = {}
    for i, file in enumerate(files):
        name = file_name(i, len(files))
        headers[name] = {n: place.info for n, place in read_header(file).items()}
        file.rename(directory / name)
    write_index(directory, headers)
