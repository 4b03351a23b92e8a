"""Files that several ranks write together: every stage its own, all of them or none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from asyppo_megatron.convert.export import Bucket
from asyppo_megatron.convert.hf_io import plan_files
from asyppo_megatron.convert.safetensors_file import SafetensorsFile, TensorInfo

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
