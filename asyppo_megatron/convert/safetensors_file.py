"""The safetensors format, written tensor by tensor and checked when read.

A file is an 8-byte little-endian header length, a JSON header and the raw tensors back to back. The safetensors
library writes whole files only, so the writer is here; tensors are read through the library (`hf_io`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asyppo_megatron.convert.raw_file import Span, copy_at, named_os_errors, raw_bytes, write_at

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_PAGE = 4096  # writing to the middle of one costs a fifth more
_MAX_HEADER = 100 << 20  # the safetensors library's own limit


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class SafetensorsFile:
    """One file whose tensors are known beforehand and written in any order, by any number of processes.

    Args:
        path: the file.
        tensors: every tensor in file order.
        create: write the header and set the size; False opens what another process created.
        early: let the device begin with each tensor at once; for a file that will be synced.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo], *, create: bool = True, early: bool = False):
        self.path, self.tensors, self._early = path, dict(tensors), early
        header, self._offsets, size = self._layout()
        with named_os_errors(path):
            self._fd = os.open(path, os.O_RDWR | (os.O_CREAT | os.O_TRUNC if create else 0), 0o644)
            if create:
                write_at(self._fd, memoryview(header), 0)
                os.ftruncate(self._fd, size)

    def _layout(self) -> tuple[bytes, dict[str, int], int]:
        """Header, place of every tensor, size. Tensors of whole pages come first and so begin on a page."""
        tree: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offsets, end = {}, 0
        for name, info in sorted(self.tensors.items(), key=lambda kv: kv[1].num_bytes % _PAGE > 0):
            offsets[name], end = end, end + info.num_bytes
            tree[name] = {
                "dtype": _CODES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [offsets[name], end],
            }
        text = json.dumps(tree, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % _PAGE)
        start = 8 + len(text)
        return len(text).to_bytes(8, "little") + text, {n: start + o for n, o in offsets.items()}, start + end

    def write(self, name: str, tensor: Tensor, span: Span | None = None) -> None:
        """Write one tensor; it must have the announced shape and dtype.

        Args:
            span: where its bytes lie in a file, if they do: then they never enter this process.
        """
        info = self.tensors[name]
        if (tuple(tensor.shape), tensor.dtype) != (info.shape, info.dtype):
            raise ValueError(
                f"{self.path}: {name}: got {tuple(tensor.shape)} {tensor.dtype}, need {info.shape} {info.dtype}"
            )
        with named_os_errors(self.path):
            if span is not None:
                copy_at(self._fd, span, self._offsets[name], early=self._early)
            else:
                write_at(self._fd, raw_bytes(tensor), self._offsets[name], early=self._early)

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


@dataclass(frozen=True)
class Place:
    """A tensor in a file.

    Attributes:
        info: its shape and dtype.
        offset: its first byte, counted from the beginning of the file.
    """

    info: TensorInfo
    offset: int


def read_header(path: Path) -> dict[str, Place]:
    """Name -> place of a file's tensors, in file order, after checking that the file holds all their bytes.

    Raises:
        ValueError: not a safetensors file, truncated, or a dtype that no model here has.
    """
    tree, start, size = _read_tree(path)
    places = {name: _place(path, name, item, start) for name, item in tree.items() if name != "__metadata__"}
    for name, place in places.items():
        if place.offset + place.info.num_bytes > size:
            raise ValueError(
                f"{path}: {name}: got a file of {size} bytes, need {place.offset + place.info.num_bytes} to hold this "
                f"tensor of {place.info.num_bytes}; the file is truncated, fetch it again"
            )
    return dict(sorted(places.items(), key=lambda kv: kv[1].offset))


def _read_tree(path: Path) -> tuple[dict[str, Any], int, int]:
    """The JSON header, where the tensors begin, and the size of the file."""
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
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: got a header that is no JSON object, need a safetensors file; fetch it again")
    return tree, 8 + length, size


def _place(path: Path, name: str, item: Any, start: int) -> Place:
    """One line of a header, which a stranger wrote."""
    try:
        code, shape, (begin, end) = item["dtype"], tuple(item["shape"]), item["data_offsets"]
        is_plain = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        is_plain = False
    if not is_plain:
        raise ValueError(f"{path}: {name}: got {item!r}, need dtype, shape and data_offsets; fetch the file again")
    if code not in DTYPES:
        raise ValueError(
            f"{path}: {name}: got dtype {code}, need one of {', '.join(DTYPES)}; use a checkpoint that is not quantised"
        )
    info = TensorInfo(shape, DTYPES[code])
    if end - begin != info.num_bytes:
        raise ValueError(
            f"{path}: {name}: got {end - begin} bytes, need {info.num_bytes} for {code} {list(shape)}; the file is "
            "damaged, fetch it again"
        )
    return Place(info, start + begin)
