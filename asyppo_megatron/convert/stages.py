"""Files that several ranks write together: every stage its own, all of them or none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from asyppo_megatron.convert.atomic import atomic_directory, partial_path
from asyppo_megatron.convert.export import Bucket
from asyppo_megatron.convert.hf_io import plan_files
from asyppo_megatron.convert.safetensors_file import SafetensorsFile, TensorInfo

if TYPE_CHECKING:
    from asyppo_megatron.parallel.process_groups import RoleGroups

T = TypeVar("T")


def together(group: Any, device: torch.device, action: Callable[[], T]) -> T:
    """Run `action` on every rank of `group`; if one fails, all raise. Also a barrier.

    Args:
        group: ranks that take part, each calling this; None for a process alone.
        device: device of the group's collectives.
    """
    error, result = None, None
    try:
        result = action()
    except (OSError, ValueError) as e:
        error = e
    if group is not None and group.size() > 1:
        failed = torch.tensor([error is not None], dtype=torch.int32, device=device)
        dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=group)
        if failed.item() and error is None:
            raise OSError("failed on another rank; its log says why")
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def leads(groups: RoleGroups) -> bool:
    """Whether this is the one rank of a role that makes and names its directories."""
    at = groups.at
    return at.tp == at.pp == at.dp == at.cp == 0


def write_together(
    target: Path,
    groups: RoleGroups,
    device: torch.device,
    write: Callable[[Path], object],
    finish: Callable[[Path], object],
    *,
    force: bool,
    durable: bool,
) -> None:
    """All ranks of a role fill one directory, which appears complete or not at all.

    Collective over `groups.role`.

    Args:
        write: called with the directory on the ranks of the first dp index.
        finish: called on the leading rank when all have written.
        durable: wait until the bytes are on the device.
    """
    partial = partial_path(target)
    is_writer = groups.at.dp == 0 and groups.at.cp == 0

    def begin() -> None:
        if leads(groups):
            directory.enter_context(atomic_directory(target, force=force, durable=durable))

    def end() -> None:
        if leads(groups):
            finish(partial)
            directory.close()

    with ExitStack() as directory:
        together(groups.role, device, begin)
        together(groups.role, device, lambda: write(partial) if is_writer else None)
        together(groups.role, device, end)


def write_stage(
    stream: Iterator[Bucket],
    tensors: Mapping[str, TensorInfo],
    directory: Path,
    stem: str,
    *,
    max_file_bytes: int,
    sync: bool,
) -> list[str]:
    """Write one stage's stream to `stem`-00000.safetensors and so on.

    After an error the rest of the stream is still consumed: the other tp ranks are in its collectives.

    Returns:
        The files' names.
    """
    error: OSError | None = None
    files: dict[str, SafetensorsFile] = {}
    names: list[str] = []
    try:
        for part in plan_files(tensors, max_file_bytes):
            names.append(f"{stem}-{len(names):05d}.safetensors")
            files.update(dict.fromkeys(part, SafetensorsFile(directory / names[-1], part)))
    except OSError as e:
        error = e
    for bucket in stream:
        try:
            for name, tensor in bucket if error is None else ():
                files[name].write(name, tensor.cpu())
        except OSError as e:
            error = e
    for file in dict.fromkeys(files.values()):
        try:
            file.close(sync=sync and error is None)
        except OSError as e:
            error = error or e
    if error is not None:
        raise error
    return names
