"""Bytes of tensors in files: mapped to be read, copied by the kernel where nothing changes, flushed early.

A conversion mostly moves bytes as they are. Through a process's memory each costs a page fault and a second copy;
between files the kernel moves them by itself. And a device that begins to write only when everything is there makes
the end wait.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_LIBC = ctypes.CDLL(None)
_MADV_POPULATE_READ = 22  # Linux 5.14; older kernels answer EINVAL, and pages come one by one
_SYNC_FILE_RANGE_WRITE = 2
# Larger writes get larger pages of the page cache, which a virtual machine may have to fetch from its host first:
# 64 KiB pieces took 0.4 s a GB where 16 MiB pieces took 2.4 s.
_PIECE = 64 << 10
_FLUSHED = 8 << 20  # bytes that the device is told to begin with at a time
_NO_SENDFILE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def named_os_errors(path: Path) -> Iterator[None]:
    """Let a full disk say which file did not fit."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(e.errno, f"{e.strerror}; free space there or choose another directory", str(path)) from e
        raise


def prefault(tensor: Tensor) -> Tensor:
    """Read a mapped tensor in one go: page by page costs twice the time of a conversion. A hint: it cannot fail."""
    if tensor.numel() and tensor.is_contiguous():
        first = tensor.data_ptr() & -mmap.PAGESIZE
        last = tensor.data_ptr() + tensor.numel() * tensor.itemsize
        _LIBC.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_POPULATE_READ)
    return tensor


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor; contiguous ones are not copied."""
    flat = tensor.detach().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


@dataclass(frozen=True)
class Span:
    """Consecutive bytes of a mapped file."""

    file: MappedFile
    offset: int
    length: int


class MappedFile:
    """A file as tensors that are read when they are used; they must not be written to."""

    def __init__(self, path: Path):
        self.path = path
        self._file = path.open("rb", buffering=0)
        self._storage = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
        self._base = self._storage.data_ptr()

    def fileno(self) -> int:
        return self._file.fileno()

    def tensor(self, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """The tensor that begins at byte `offset`: a view of the file, a copy only where the offset is not aligned."""
        size = torch.Size(shape).numel()
        if offset % dtype.itemsize:
            flat = torch.tensor([], dtype=torch.uint8).set_(self._storage, offset, (size * dtype.itemsize,))  # type: ignore[call-overload]
            return flat.clone().view(dtype).view(shape)
        return torch.tensor([], dtype=dtype).set_(self._storage, offset // dtype.itemsize, (size,)).view(shape)  # type: ignore[call-overload]

    def span(self, tensor: Tensor) -> Span | None:
        """Where a tensor's bytes lie in the file; None for one that lies elsewhere or not in one piece."""
        offset, length = tensor.data_ptr() - self._base, tensor.numel() * tensor.itemsize
        if not tensor.is_contiguous() or offset < 0 or offset + length > self._storage.nbytes():
            return None
        return Span(self, offset, length)


class MappedFiles:
    """The files of one checkpoint, each mapped at its first use."""

    def __init__(self) -> None:
        self._files: dict[Path, MappedFile] = {}

    def __getitem__(self, path: Path) -> MappedFile:
        if path not in self._files:
            self._files[path] = MappedFile(path)
        return self._files[path]

    def span(self, tensor: Tensor) -> Span | None:
        """Where a tensor's bytes lie in one of the files; None for a tensor made in memory."""
        return next((s for f in self._files.values() if (s := f.span(tensor)) is not None), None)

    def close(self) -> None:
        """Drop the mappings; tensors that are still held stay valid."""
        self._files.clear()


def write_at(fd: int, data: memoryview, offset: int, *, early: bool = False) -> None:
    """Write bytes at a place in a file.

    Args:
        early: let the device begin with them at once; for files that will be waited for.
    """
    for first in range(0, len(data), _FLUSHED):
        last = min(first + _FLUSHED, len(data))
        done = first
        while done < last:
            done += os.pwrite(fd, data[done : min(done + _PIECE, last)], offset + done)
        if early:
            _begin_flush(fd, offset + first, last - first)


def copy_at(fd: int, source: Span, offset: int, *, early: bool = False) -> None:
    """Copy bytes of another file to a place in a file, within the kernel.

    The position of `fd` is moved: a process opens the file for itself.

    Args:
        early: as in `write_at`.
    """
    os.lseek(fd, offset, os.SEEK_SET)
    done = 0
    while done < source.length:
        last = min(done + _FLUSHED, source.length)
        first = done
        while done < last:
            try:
                count = os.sendfile(fd, source.file.fileno(), source.offset + done, last - done)
            except OSError as e:
                if done or e.errno not in _NO_SENDFILE:
                    raise
                log.info("%s: this file system copies no files within the kernel (%s)", source.file.path, e.strerror)
                whole = source.file.tensor(source.offset, torch.uint8, (source.length,))
                write_at(fd, raw_bytes(prefault(whole)), offset, early=early)
                return
            if not count:
                raise OSError(
                    errno.EIO, "got the end of the file; it has shrunk, fetch it again", str(source.file.path)
                )
            done += count
        if early:
            _begin_flush(fd, offset + first, last - first)


def _begin_flush(fd: int, offset: int, length: int) -> None:
    """Start to write a range to the device without waiting for it. A hint: the sync at the end does what it did not."""
    _LIBC.sync_file_range(fd, ctypes.c_int64(offset), ctypes.c_int64(length), _SYNC_FILE_RANGE_WRITE)
