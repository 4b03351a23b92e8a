"""Megatron distributed checkpoint -> Hugging Face checkpoint, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from asyppo_megatron.convert.atomic import atomic_directory
from asyppo_megatron.convert.hf_io import MAX_FILE_BYTES, file_name, plan_files, write_index, write_sidecars
from asyppo_megatron.convert.megatron_io import MegatronCheckpoint
from asyppo_megatron.convert.pool import default_processes, run_split
from asyppo_megatron.convert.progress import Progress
from asyppo_megatron.convert.raw_file import Span
from asyppo_megatron.convert.safetensors_file import SafetensorsFile, TensorInfo
from asyppo_megatron.convert.table import Entry, Role


def megatron_to_hf(
    source: MegatronCheckpoint,
    config_path: Path,
    target: Path,
    *,
    role: Role,
    dtype: torch.dtype | None = None,
    force: bool = False,
    processes: int | None = None,
    quiet: bool = False,
    max_file_bytes: int = MAX_FILE_BYTES,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write `target`; it appears complete or not at all.

    Args:
        source: what to convert.
        config_path: directory whose config, tokenizer and generation config are carried along.
        dtype: dtype of the tensors; None keeps each one's.
        check: called with the finished directory before it gets its name.

    Raises:
        ValueError, OSError: naming the tensor or file; `target` is as it was.
    """
    table = list(source.entries.values())
    infos = {n: TensorInfo(shape, dtype or source.info(e.name).dtype) for e in table for n, shape in e.hf}
    plan = plan_files(infos, max_file_bytes)
    names = {file_name(i, len(plan)): tensors for i, tensors in enumerate(plan)}
    sizes = [sum(infos[n].num_bytes for n, _ in e.hf) for e in table]
    with atomic_directory(target, force=force) as partial:
        for file in _open(partial, names, create=True):
            file.close()

        def work(index: int, items: range, report: Callable[[int], None]) -> None:
            _write(source, [table[i] for i in items], _open(partial, names, create=False), report)

        progress = Progress(f"{source.path.name} -> {target.name}", sum(sizes), quiet=quiet)
        # File systems let one process at a time write into a file: two would wait for each other.
        run_split(work, sizes, processes=min(processes or default_processes(), len(plan)), progress=progress)
        write_index(partial, names)
        write_sidecars(config_path, partial, role, next(iter(infos.values())).dtype)
        if check is not None:
            check(partial)


def _open(directory: Path, names: Mapping[str, Mapping[str, TensorInfo]], *, create: bool) -> list[SafetensorsFile]:
    return [SafetensorsFile(directory / name, tensors, create=create, early=True) for name, tensors in names.items()]


def _write(
    source: MegatronCheckpoint, entries: list[Entry], files: list[SafetensorsFile], report: Callable[[int], None]
) -> None:
    """Convert some parameters; several processes write to the same files, each its own tensors.

    A thread reads and rearranges the next parameter while this one is written: one more is held in memory.
    """
    file_of = {name: file for file in files for name in file.tensors}

    def read(entry: Entry) -> list[tuple[str, Tensor, Span | None]]:
        tensors = zip(entry.hf, source.read_hf(entry.name), strict=True)
        converted = [(name, tensor.to(file_of[name].tensors[name].dtype)) for (name, _), tensor in tensors]
        return [(name, tensor, source.span(tensor)) for name, tensor in converted]

    with ThreadPoolExecutor(1, thread_name_prefix="read") as reader:
        following = reader.submit(read, entries[0])
        for entry in [*entries[1:], None]:
            tensors = following.result()
            if entry is not None:
                following = reader.submit(read, entry)
            for name, tensor, span in tensors:
                file_of[name].write(name, tensor, span)
            report(sum(tensor.numel() * tensor.itemsize for _, tensor, _ in tensors))
    for file in files:
        file.close()
