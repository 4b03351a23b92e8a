"""The journal: each step's rollouts on disk, complete or not there at all.

`run_dir/rollouts/step-000012/` holds one .npy file an array of `types.pack_trajectories`, `manifest.json` and the
text of a few responses in `samples.jsonl`. The directory appears by one rename, after everything in it has
reached the disk.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

SAMPLES_SHOWN = 8


def step_directory(run_dir: Path, step: int) -> Path:
    return run_dir / "rollouts" / f"step-{step:06d}"


def write_step(
    run_dir: Path, arrays: dict[str, np.ndarray], manifest: dict[str, Any], samples: Sequence[dict[str, Any]]
) -> Path:
    """Write a step, replacing one of the same number.

    Args:
        run_dir: of the run.
        arrays: of `pack_trajectories`.
        manifest: at least `step`.
        samples: rows of samples.jsonl.
    """
    final = step_directory(run_dir, manifest["step"])
    part = final.with_name(f".{final.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name, array in arrays.items():
        with (part / f"{name}.npy").open("wb") as file:
            np.save(file, array, allow_pickle=False)
            _sync(file)
    _write_text(part / "samples.jsonl", "".join(json.dumps(row) + "\n" for row in samples))
    _write_text(part / "manifest.json", json.dumps(manifest | {"arrays": sorted(arrays)}, indent=1))
    _sync_directory(part)
    if final.exists():
        stale = final.with_name(f".{final.name}.stale")
        shutil.rmtree(stale, ignore_errors=True)
        os.rename(final, stale)
        os.rename(part, final)
        shutil.rmtree(stale)
    else:
        os.rename(part, final)
    _sync_directory(final.parent)
    return final


def load_step(run_dir: Path, step: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays (mapped read-only, not read) and manifest of a complete step.

    Raises:
        FileNotFoundError: there is no such step.
        ValueError: the directory is damaged.
    """
    directory = step_directory(run_dir, step)
    if not directory.is_dir():
        raise FileNotFoundError(f"journal {directory}: no such step")
    try:
        manifest = json.loads((directory / "manifest.json").read_text())
        names = manifest["arrays"]
        arrays = {n: np.load(directory / f"{n}.npy", mmap_mode="r", allow_pickle=False) for n in names}
    except (OSError, ValueError, KeyError, EOFError) as e:
        raise ValueError(f"journal {directory}: is damaged ({e}); remove it to generate the step again") from e
    return arrays, manifest


def journalled_steps(run_dir: Path) -> list[int]:
    """Numbers of the complete steps, ascending."""
    return sorted(int(d.name.removeprefix("step-")) for d in (run_dir / "rollouts").glob("step-*") if d.is_dir())


def prune(run_dir: Path, before_step: int) -> None:
    """Remove the complete steps before one."""
    for step in journalled_steps(run_dir):
        if step < before_step:
            shutil.rmtree(step_directory(run_dir, step))


def remove_leftovers(run_dir: Path) -> None:
    """Remove what a killed writer left half-written; only for the one who writes."""
    for pattern in (".step-*.part", ".step-*.stale"):
        for leftover in (run_dir / "rollouts").glob(pattern):
            shutil.rmtree(leftover)


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        _sync(file)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
