"""Directories that appear complete or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path


def partial_path(target: Path) -> Path:
    """Where the content of `target` grows until it is complete: beside it, so that a rename is enough."""
    return target.parent / f".{target.name}.partial"


def check_target(target: Path, force: bool) -> None:
    """Refuse to overwrite.

    Raises:
        ValueError: `target` exists and `force` is false, or it is no directory.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target}: got a file, need a directory to write; choose another path")
    if not force and any(target.iterdir()):
        raise ValueError(f"{target}: got an existing directory, need a new one; choose another or use --force")


@contextmanager
def atomic_directory(target: Path, *, force: bool = False, durable: bool = True) -> Iterator[Path]:
    """A directory to fill: renamed to `target` when the block ends, removed when it raises.

    A killed process leaves `partial_path(target)` behind, which the next attempt empties; its lock dies with it.

    Args:
        target: the directory to make.
        force: replace an existing one.
        durable: wait until everything is on the device, so that a power loss cannot leave a target of empty files.

    Raises:
        ValueError: `target` exists and `force` is false, or another process is writing it.
    """
    check_target(target, force)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(target)
    partial.mkdir(exist_ok=True)
    lock = _lock(partial, target)
    try:
        _empty(partial)
        yield partial
        if durable:
            sync_files(partial)
        _commit(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already when committed
        os.close(lock)


def _lock(partial: Path, target: Path) -> int:
    fd = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        os.close(fd)
        raise ValueError(f"{target}: got another process writing {partial}; wait for it to end") from e
    return fd


def _empty(directory: Path) -> None:
    for item in directory.iterdir():
        if item.is_dir():
            shutil.rmtree(item)
        else:
            item.unlink()


def _commit(partial: Path, target: Path) -> None:
    sync(partial)
    old = target.parent / f".{target.name}.old"
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    partial.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync_files(directory: Path) -> None:
    """Wait until what has been written to the files of a directory is on the device; all at once, it costs half."""
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(sync, directory.iterdir()))


def sync(path: Path) -> None:
    """Make a file's bytes, or a directory's names, survive a power loss."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
