"""Hugging Face checkpoint -> Megatron distributed checkpoint, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from asyppo_megatron.convert.atomic import atomic_directory
from asyppo_megatron.convert.critic import initial_value_head
from asyppo_megatron.convert.hf_io import HFCheckpoint, check_checkpoint, write_sidecars
from asyppo_megatron.convert.megatron_io import write_checkpoint_metadata, write_objects, write_parameter
from asyppo_megatron.convert.pool import default_processes, run_split
from asyppo_megatron.convert.progress import Progress
from asyppo_megatron.convert.raw_file import Span
from asyppo_megatron.convert.safetensors_file import TensorInfo
from asyppo_megatron.convert.table import Entry, Role, entries, hf_tensors
from asyppo_megatron.convert.torch_dist import Chunk, DataFile
from asyppo_megatron.models.spec import ModelSpec


@dataclass(frozen=True)
class Layout:
    """The layout that a checkpoint is cut for; it loads in any other too."""

    tp: int = 1
    pp: int = 1
    ep: int = 1

    def check(self, spec: ModelSpec) -> None:
        """Refuse a layout that the model cannot run in."""
        errors = spec.layout_errors(self, "convert")
        if self.ep > 1 and (not spec.num_experts or spec.num_experts % self.ep):
            errors.append(f"ep: got {self.ep}, need a divisor of the model's {spec.num_experts} experts; change --ep")
        if errors:
            raise ValueError("; ".join(errors))


class HFSource:
    """A Hugging Face checkpoint as one role sees it: a critic may get a new value head.

    Args:
        dtype: dtype of the tensors; None keeps each one's.
        head_seed: seed of a new head's weights, None for zeros; unused where the checkpoint has a head.
    """

    def __init__(self, path: Path, role: Role, dtype: torch.dtype | None, head_seed: int | None):
        self.spec = ModelSpec.from_hf(path)
        self.checkpoint = HFCheckpoint(path)
        self.unused = check_checkpoint(self.checkpoint, self.spec, role)
        self.entries = entries(self.spec, role)
        self._shapes = hf_tensors(self.spec, role)
        self.dtype = dtype
        self._head_seed = head_seed

    @property
    def is_unchanged(self) -> bool:
        """Whether this role's tensors are those of the checkpoint, all of them and as they are."""
        held = [n for n in self._shapes if n in self.checkpoint]
        same = all(self.checkpoint.info(n).dtype == (self.dtype or self.checkpoint.info(n).dtype) for n in held)
        return same and len(held) == len(self._shapes)

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of a tensor of this role."""
        in_file = self.checkpoint.info(name if name in self.checkpoint else "model.norm.weight")
        return TensorInfo(self._shapes[name], self.dtype or in_file.dtype)

    def read(self, name: str) -> Tensor:
        """A tensor of this role, mapped from its file where it needs no change."""
        if name in self.checkpoint:
            tensor = self.checkpoint.read(name)
        else:
            weight, bias = initial_value_head(self.spec.hidden_size, self._head_seed)
            tensor = weight if name == "score.weight" else bias  # a head without a bias gets a zero one
        return tensor.to(self.info(name).dtype)

    def span(self, tensor: Tensor) -> Span | None:
        """Where the bytes of something that was read, or of a part of it, lie; None where they were changed."""
        return self.checkpoint.span(tensor)

    def entry_dtype(self, entry: Entry) -> torch.dtype:
        """The one dtype of an entry's tensors."""
        found = {self.info(n).dtype for n, _ in entry.hf}
        if len(found) > 1:
            raise ValueError(f"{entry.hf[0][0]}: got {sorted(map(str, found))} in one layer, need one; choose --dtype")
        return found.pop()

    def entry_bytes(self, entry: Entry) -> int:
        return sum(self.info(n).num_bytes for n, _ in entry.hf)


def hf_to_megatron(
    source: HFSource,
    source_path: Path,
    target: Path,
    *,
    role: Role,
    layout: Layout,
    force: bool = False,
    processes: int | None = None,
    quiet: bool = False,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write `target`; it appears complete or not at all.

    Args:
        source: what to convert.
        source_path: its directory; config, tokenizer and generation config are carried along.
        layout: cuts tensors into the pieces that tp ranks read.
        check: called with the finished directory before it gets its name.

    Raises:
        ValueError, OSError: naming the tensor or file; `target` is as it was.
    """
    spec = source.spec
    layout.check(spec)
    table = list(source.entries.values())
    dtypes = {e.name: source.entry_dtype(e) for e in table}
    sizes = [source.entry_bytes(e) for e in table]
    with atomic_directory(target, force=force) as partial:

        def work(index: int, items: range, report: Callable[[int], None]) -> list[Chunk]:
            file = DataFile(partial / f"__{index}_0.distcp")
            objects = write_objects(file, spec) if index == 0 else []
            return objects + _write(source, [table[i] for i in items], file, layout.tp, report)

        progress = Progress(f"{source_path.name} -> {target.name}", sum(sizes), quiet=quiet)
        results = run_split(work, sizes, processes=processes or default_processes(), progress=progress)
        write_checkpoint_metadata(partial, spec, role, dtypes, (c for chunks in results for c in chunks))
        write_sidecars(source_path, partial, role, next(iter(dtypes.values())))
        if check is not None:
            check(partial)


def _write(
    source: HFSource, entries: list[Entry], file: DataFile, tp: int, report: Callable[[int], None]
) -> list[Chunk]:
    """Convert some parameters into one data file."""
    chunks = []
    for entry in entries:
        chunks += write_parameter(file, entry, [source.read(n) for n, _ in entry.hf], tp, source.spec, source.span)
        report(source.entry_bytes(entry))
    file.close()
    return chunks
