"""The safetensors format, written tensor by tensor and checked when read.

A file is an 8-byte little-endian header length, a JSON header and the raw tensors back to back. The safetensors
library writes whole files only, so the writer is here; tensors are read through the library (`hf_io`).
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER = 100 << 20  # the safetensors library's own limit
_LIBC = ctypes.CDLL(None)
_MADV_POPULATE_READ = 22  # Linux 5.14; older kernels answer EINVAL, and pages come one by one
# Larger writes get larger pages of the page cache, which a virtual machine may have to fetch from its host first:
# 64 KiB pieces took 0.4 s a GB where 16 MiB pieces took 2.4 s.
_PIECE = 64 << 10


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


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
    if tensor.numel():
        first = tensor.data_ptr() & -mmap.PAGESIZE
        last = tensor.data_ptr() + tensor.numel() * tensor.itemsize
        _LIBC.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_POPULATE_READ)
    return tensor


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor; contiguous ones are not copied."""
    flat = tensor.detach().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def pwrite_all(fd: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done : done + _PIECE], offset + done)


class SafetensorsFile:
    """One file whose tensors are known beforehand and written in any order, by any number of processes.

    Args:
        path: the file.
        tensors: every tensor in file order.
        create: write the header and set the size; False opens what another process created.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo], *, create: bool = True):
        self.path, self.tensors = path, dict(tensors)
        header, self._offsets, size = self._layout()
        with named_os_errors(path):
            self._fd = os.open(path, os.O_RDWR | (os.O_CREAT | os.O_TRUNC if create else 0), 0o644)
            if create:
                pwrite_all(self._fd, memoryview(header), 0)
                os.ftruncate(self._fd, size)

    def _layout(self) -> tuple[bytes, dict[str, int], int]:
        tree: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offsets, end = {}, 0
        for name, info in self.tensors.items():
            offsets[name], end = end, end + info.num_bytes
            tree[name] = {
                "dtype": _CODES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [offsets[name], end],
            }
        text = json.dumps(tree, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        return len(text).to_bytes(8, "little") + text, {n: start + o for n, o in offsets.items()}, start + end

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor; it must have the announced shape and dtype."""
        info = self.tensors[name]
        if (tuple(tensor.shape), tensor.dtype) != (info.shape, info.dtype):
            raise ValueError(
                f"{self.path}: {name}: got {tuple(tensor.shape)} {tensor.dtype}, need {info.shape} {info.dtype}"
            )
        with named_os_errors(self.path):
            pwrite_all(self._fd, raw_bytes(tensor), self._offsets[name])

    def close(self, *, sync: bool = False) -> None:
        """Close the file; `sync` waits until the bytes are on the device."""
        if self._fd < 0:
            return
        try:
            with named_os_errors(self.path):
                if sync:
                    os.fsync(self._fd)
        finally:
            os.close(self._fd)
            self._fd = -1


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Name -> info of a file's tensors, after checking that the file holds all their bytes.

    Raises:
        ValueError: not a safetensors file, truncated, or a dtype that no model here has.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(_MAX_HEADER, size - 8):
                raise ValueError(f"{path}: got {size} bytes, need a header of {length}; fetch the file again")
            tree = json.loads(f.read(length))
    except OSError as e:
        raise ValueError(f"{path}: got {e.strerror}, need a readable safetensors file; fetch it again") from e
    except (UnicodeDecodeError, json.JSONDecodeError) as e:
        raise ValueError(f"{path}: got no JSON header, need a safetensors file; fetch it again") from e
    tree.pop("__metadata__", None)
    infos = {}
    for name, item in sorted(tree.items(), key=lambda kv: kv[1]["data_offsets"]):
        if item["dtype"] not in DTYPES:
            raise ValueError(
                f"{path}: {name}: got dtype {item['dtype']}, need one of {', '.join(DTYPES)}; "
                "use a checkpoint that is not quantised"
            )
        infos[name] = TensorInfo(tuple(item["shape"]), DTYPES[item["dtype"]])
        begin, end = item["data_offsets"]
        if end - begin != infos[name].num_bytes or 8 + length + end > size:
            raise ValueError(
                f"{path}: {name}: got a file of {size} bytes, need {8 + length + end} to hold this tensor of "
                f"{infos[name].num_bytes}; the file is truncated or damaged, fetch it again"
            )
    return infos
