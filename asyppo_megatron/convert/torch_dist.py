"""Megatron's distributed checkpoint format ("torch_dist") on disk, one tensor at a time.

Data files hold `torch.save` archives back to back; `.metadata` (a pickle of torch.distributed.checkpoint) says which
part of which tensor lies where. Megatron's own save and load want whole models in memory and a process group.
"""

from __future__ import annotations

import enum
import io
import json
import os
import pickle
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata, planner

from asyppo_megatron.convert.raw_file import MappedFiles, Span, copy_at, named_os_errors, raw_bytes, write_at

_ALIGNMENT = 4096  # of a tensor's bytes: a reader can map them, and writing to the middle of a page costs a fifth more
_BACKENDS = {"sharded_backend": "torch_dist", "common_backend": "torch"}
_ALLOWED_MODULES = {m.__name__: m for m in (filesystem, metadata, planner)}
_ALLOWED_NAMES = {
    "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
    "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING", "_StorageInfo", "_StoragePrefix", "SavePlan",
    "WriteItem", "WriteItemType", "TensorWriteData",
}  # fmt: skip
_ALLOWED_OTHERS = {
    ("torch", "Size"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath"), ("pathlib", "Path"),
    ("pathlib._local", "PosixPath"), ("collections", "OrderedDict"), ("collections", "defaultdict"),
    ("builtins", "set"), ("builtins", "dict"), ("builtins", "list"),
}  # fmt: skip


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor in a file.

    Attributes:
        key: name of the tensor in the checkpoint.
        start: first index along each dim.
        shape: size along each dim.
        file: name of the data file.
        offset: first byte of the archive.
        length: bytes of the archive.
    """

    key: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


def _enum_member(owner: Any, name: str) -> enum.Enum:
    """Python 3.11 pickles an enum's member as `getattr(owner, name)`; this serves that and nothing more."""
    if not (isinstance(owner, type) and issubclass(owner, enum.Enum) and name in owner.__members__):
        raise ValueError(
            f"got an attribute {name!r} in checkpoint metadata, need plain metadata; do not trust this file"
        )
    return owner.__members__[name]


class _Unpickler(pickle.Unpickler):
    """Reads checkpoint metadata and nothing else: a pickle could run any code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        allowed = module in _ALLOWED_MODULES and name in _ALLOWED_NAMES
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if allowed or is_dtype or (module, name) in _ALLOWED_OTHERS:
            return super().find_class(module, name)
        raise ValueError(f"got {module}.{name} in checkpoint metadata, need plain metadata; do not trust this file")


def read_metadata(directory: Path) -> dict[str, Stored]:
    """Tensors of a distributed checkpoint by key.

    Raises:
        ValueError: not such a checkpoint, or a data file is missing or truncated.
    """
    path = directory / ".metadata"
    try:
        with path.open("rb") as f:
            tree = _Unpickler(f).load()
    except OSError as e:
        raise ValueError(f"{path}: got {e.strerror}, need a Megatron distributed checkpoint; check the path") from e
    except (ValueError, pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError) as e:
        raise ValueError(f"{path}: cannot be read ({e}); the checkpoint is damaged, save or fetch it again") from e
    sizes = {p.name: p.stat().st_size for p in directory.iterdir()}
    chunks: dict[str, list[Chunk]] = {}
    for index, info in tree.storage_data.items():
        item = tree.state_dict_metadata.get(index.fqn)
        if not isinstance(item, metadata.TensorStorageMetadata):
            continue
        got, need = sizes.get(info.relative_path, 0), info.offset + info.length
        if got < need:
            raise ValueError(
                f"{directory / info.relative_path}: {index.fqn}: got a file of {got} bytes, need {need}; it is missing "
                "or truncated, save or fetch the checkpoint again"
            )
        start = tuple(index.offset) if index.offset is not None else (0,) * len(item.size)
        shape = next(tuple(c.sizes) for c in item.chunks if tuple(c.offsets) == start)
        chunks.setdefault(index.fqn, []).append(
            Chunk(index.fqn, start, shape, info.relative_path, info.offset, info.length)
        )
    return {
        key: Stored(tuple(item.size), item.properties.dtype, tuple(chunks.get(key, ())))
        for key, item in tree.state_dict_metadata.items()
        if isinstance(item, metadata.TensorStorageMetadata)
    }


class _Window(io.RawIOBase):
    """A part of an open file as a file."""

    def __init__(self, file: io.BufferedReader, offset: int, length: int):
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, at: int, whence: int = os.SEEK_SET) -> int:
        self._at = at + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), self._length - self._at)
        self._file.seek(self._offset + self._at)
        done = self._file.readinto(memoryview(buffer)[:count])
        self._at += done
        return done


def read_chunk(mapped: MappedFiles, path: Path, chunk: Chunk, dtype: torch.dtype) -> Tensor:
    """A chunk's tensor, mapped from its file where its archive is plain and aligned, else read. Do not write to it."""
    try:
        with path.open("rb") as f:
            window = _Window(f, chunk.offset, chunk.length)
            begin = _data_offset(window, torch.Size(chunk.shape).numel() * dtype.itemsize)
            if begin is None or (chunk.offset + begin) % dtype.itemsize:
                window.seek(0)
                return torch.load(window, map_location="cpu", weights_only=True).view(chunk.shape)
    except (zipfile.BadZipFile, RuntimeError, EOFError, pickle.UnpicklingError) as e:
        raise ValueError(f"{path}: {chunk.key}: cannot be read ({e}); the file is damaged, fetch it again") from e
    return mapped[path].tensor(chunk.offset + begin, dtype, chunk.shape)


def _data_offset(window: _Window, size: int) -> int | None:
    """Where the raw bytes of a saved tensor begin; None unless they are exactly the tensor, uncompressed."""
    with zipfile.ZipFile(window) as archive:  # type: ignore[arg-type]
        found = [i for i in archive.infolist() if i.filename.endswith("/data/0")]
        order = [i for i in archive.infolist() if i.filename.endswith("/byteorder")]
        if len(found) != 1 or found[0].file_size != size or found[0].compress_type != zipfile.ZIP_STORED:
            return None
        if order and archive.read(order[0]) != b"little":
            return None
        window.seek(found[0].header_offset + 26)
        lengths = window.read(4)
    return found[0].header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")


class _Archive:
    """What `torch.save` writes around the bytes of one tensor: it sees this object as its file."""

    def __init__(self) -> None:
        self.head, self.tail = bytearray(), bytearray()
        self.room = 0

    def write(self, data: Any) -> int:
        raw = memoryview(data).cast("B")
        (self.tail if self.room else self.head).extend(raw)
        return len(raw)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Leave room for the tensor; torch asks for nothing else."""
        assert whence == os.SEEK_CUR and not self.room
        self.room = offset
        return len(self.head) + offset

    def tell(self) -> int:
        return len(self.head) + self.room + len(self.tail)

    def flush(self) -> None:
        """Nothing is buffered."""

    @classmethod
    def of(cls, content: Any) -> _Archive:
        archive = cls()
        with torch.serialization.skip_data():
            torch.save(content, archive)
        return archive


class DataFile:
    """A data file that grows tensor by tensor."""

    def __init__(self, path: Path):
        self.path = path
        with named_os_errors(path):
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._end = 0
        self._archives: dict[tuple[torch.dtype, tuple[int, ...]], _Archive] = {}  # every layer has the same few

    def _append(self, archive: _Archive, data: memoryview | Span | None) -> tuple[int, int]:
        """Append an archive with `data` in the place of its tensor; (offset, length)."""
        begin = -(-(self._end + len(archive.head)) // _ALIGNMENT) * _ALIGNMENT
        offset = begin - len(archive.head)
        with named_os_errors(self.path):
            write_at(self._fd, memoryview(archive.head), offset)
            if isinstance(data, Span):
                copy_at(self._fd, data, begin, early=True)
            elif data is not None:
                write_at(self._fd, data, begin, early=True)
            write_at(self._fd, memoryview(archive.tail), begin + archive.room)
        self._end = offset + archive.tell()
        return offset, archive.tell()

    def add(
        self, key: str, start: tuple[int, ...], shape: tuple[int, ...], tensor: Tensor, span: Span | None = None
    ) -> Chunk:
        """Append a chunk; contiguous tensors are not copied, views are not saved with what they are views of.

        Args:
            span: where the tensor's bytes lie in a file, if they do: then they never enter this process.
        """
        raw = raw_bytes(tensor)
        archive = self._archives.get((tensor.dtype, shape))
        if archive is None:
            archive = _Archive.of(torch.frombuffer(raw, dtype=tensor.dtype).view(shape))
            self._archives[tensor.dtype, shape] = archive
        return Chunk(key, start, shape, self.path.name, *self._append(archive, raw if span is None else span))

    def add_object(self) -> Chunk:
        """Append the empty state object that Megatron keeps for each linear layer; the key is the caller's."""
        return Chunk("", (), (), self.path.name, *self._append(_Archive.of([None]), None))

    def close(self) -> None:
        with named_os_errors(self.path):
            os.close(self._fd)


def write_metadata(directory: Path, tensors: dict[str, Stored], objects: Iterable[Chunk]) -> None:
    """Write what makes data files a checkpoint that Megatron-Core 0.16 to 0.19 loads."""
    items: dict[str, Any] = {}
    storage: dict[Any, Any] = {}
    for key, stored in tensors.items():
        boxes = [metadata.ChunkStorageMetadata(torch.Size(c.start), torch.Size(c.shape)) for c in stored.chunks]
        properties = metadata.TensorProperties(dtype=stored.dtype)
        items[key] = metadata.TensorStorageMetadata(properties, torch.Size(stored.shape), boxes)
        for c in stored.chunks:
            index = metadata.MetadataIndex(key, torch.Size(c.start))
            storage[index] = filesystem._StorageInfo(c.file, c.offset, c.length)
    for c in objects:
        items[c.key] = metadata.BytesStorageMetadata()
        storage[metadata.MetadataIndex(c.key)] = filesystem._StorageInfo(c.file, c.offset, c.length)
    with named_os_errors(directory):
        (directory / ".metadata").write_bytes(pickle.dumps(metadata.Metadata(items, storage_data=storage)))
        torch.save({}, directory / "common.pt")
        backends = {**_BACKENDS, "sharded_backend_version": 1, "common_backend_version": 1}
        (directory / "metadata.json").write_text(json.dumps(backends))
