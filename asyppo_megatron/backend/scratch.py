"""Directories outside a run's own that must not outlive it: sockets in /tmp, weights in shared memory.

Each holds a lock file that its owner keeps locked. The kernel drops the lock when the owner and all processes it
forked are gone, however they ended, so whoever can take it knows that the directory is nobody's. Process ids in
the name would not do: they are reused, and containers that share /dev/shm do not share them.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

LOCK = ".lock"
PREFIX = "asyppo-"
SHARED_MEMORY = Path("/dev/shm")


class ScratchDirectory:
    """A new directory, mode 0700, that lives as long as this process at most. Keep a reference to it.

    Args:
        parent: where to make it.
        kind: part of its name.
    """

    def __init__(self, parent: Path, kind: str):
        self._fd: int | None = None
        while self._fd is None:
            self.path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{kind}-", dir=parent))
            self._fd = _lock(self.path / LOCK, os.O_CREAT)

    def close(self) -> None:
        """Remove it; may be called twice."""
        if self._fd is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._fd)
            self._fd = None


def remove_abandoned(*parents: Path) -> list[Path]:
    """Remove the scratch directories of this user whose owners are gone; returns them.

    Args:
        parents: where to look; by default the places where runs put theirs.
    """
    removed = []
    for parent in parents or (Path(tempfile.gettempdir()), SHARED_MEMORY):
        for directory in parent.glob(f"{PREFIX}*"):
            try:
                is_ours = directory.is_dir() and directory.stat().st_uid == os.getuid()
            except OSError:  # it has just gone
                continue
            fd = _lock(directory / LOCK) if is_ours else None
            if fd is not None:
                shutil.rmtree(directory, ignore_errors=True)
                os.close(fd)
                removed.append(directory)
    return removed


def _lock(path: Path, flags: int = 0) -> int | None:
    """A descriptor that holds the file's lock; None where there is no file, or another process has it."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o600)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_nlink:  # else somebody removed it between the two calls
            return fd
    except OSError:
        pass
    os.close(fd)
    return None
