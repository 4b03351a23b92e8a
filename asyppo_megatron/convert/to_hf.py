"""Megatron distributed checkpoint -> Hugging Face checkpoint, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from asyppo_megatron.convert.atomic import atomic_directory
from asyppo_megatron.convert.hf_io import MAX_FILE_BYTES, file_name, plan_files, write_index, write_sidecars
from asyppo_megatron.convert.megatron_io import MegatronCheckpoint
from asyppo_megatron.convert.pool import default_processes, run_split
from asyppo_megatron.convert.progress import Progress
from asyppo_megatron.convert.safetensors_file import SafetensorsFile, TensorInfo
from asyppo_megatron.convert.table import Role


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

        def open_files(create: bool) -> dict[str, SafetensorsFile]:
            return {name: SafetensorsFile(partial / name, tensors, create=create) for name, tensors in names.items()}

        def work(index: int, items: range, report: Callable[[int], None]) -> None:
            files = {n: file for file in open_files(create=False).values() for n in file.tensors}
            for i in items:
                for (name, _), tensor in zip(table[i].hf, source.read_hf(table[i].name), strict=True):
                    files[name].write(name, tensor.to(infos[name].dtype))
                report(sizes[i])

        written = open_files(create=True)
        progress = Progress(f"{source.path.name} -> {target.name}", sum(sizes), quiet=quiet)
        run_split(work, sizes, processes=processes or default_processes(), progress=progress)
        for file in written.values():
            file.close()
        write_index(partial, names)
        write_sidecars(config_path, partial, role, next(iter(infos.values())).dtype)
        if check is not None:
            check(partial)
