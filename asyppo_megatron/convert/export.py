"""The one stream of a Megatron model as full Hugging Face tensors, for converters and weight sync alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from asyppo_megatron.convert.load import stage_entries
from asyppo_megatron.convert.names import named_parameters
from asyppo_megatron.convert.rows import Kind
from asyppo_megatron.convert.safetensors_file import TensorInfo
from asyppo_megatron.convert.shards import merge
from asyppo_megatron.convert.table import Entry, Role
from asyppo_megatron.models.spec import ModelSpec

Bucket = list[tuple[str, Tensor]]


@dataclass(frozen=True)
class _Piece:
    entry: Entry
    parameter: Tensor


class _Gather:
    """One bucket on its way from all tp ranks to the first (or to all)."""

    def __init__(
        self, pieces: list[_Piece], group: dist.ProcessGroup | None, dtype: torch.dtype | None, everywhere: bool
    ):
        self._pieces, self._dtype = pieces, dtype
        self._work: dist.Work | None = None
        self._parts: list[Tensor] = []
        self._receives = everywhere or group is None or group.rank() == 0
        if group is None or group.size() == 1:
            return
        cut = [p for p in pieces if p.entry.kind is not Kind.REPLICATED]
        if not cut:
            return
        self._sent = torch.cat([self._cast(p).reshape(-1) for p in cut])
        if self._receives:
            self._parts = [torch.empty_like(self._sent) for _ in range(group.size())]
        if everywhere:
            self._work = dist.all_gather(self._parts, self._sent, group=group, async_op=True)
        else:
            first = dist.get_global_rank(group, 0)
            self._work = dist.gather(self._sent, self._parts or None, dst=first, group=group, async_op=True)

    def _cast(self, piece: _Piece) -> Tensor:
        return piece.parameter.detach().to(self._dtype or piece.parameter.dtype)

    def tensors(self, spec: ModelSpec) -> Bucket:
        """Wait and merge; empty on ranks that do not receive."""
        if self._work is not None:
            self._work.wait()
        if not self._receives:
            return []
        bucket: Bucket = []
        offset = 0
        for piece in self._pieces:
            if self._parts and piece.entry.kind is not Kind.REPLICATED:
                end = offset + piece.parameter.numel()
                shards = [p[offset:end].view_as(piece.parameter) for p in self._parts]
                offset = end
            else:
                shards = [self._cast(piece)]
            full = merge(piece.entry.kind, shards, spec)
            bucket += [(name, t.contiguous()) for (name, _), t in zip(piece.entry.hf, full, strict=True)]
        return bucket


def emitted(model: nn.Module, spec: ModelSpec, role: Role) -> dict[str, Entry]:
    """Entries that this stage emits: a tied model's embedding comes from the first stage only."""
    table = stage_entries(model, spec, role)
    if spec.tied and role == "actor":
        table.pop("output_layer.weight", None)
    return table


def stage_tensors(
    model: nn.Module, spec: ModelSpec, role: Role, dtype: torch.dtype | None = None
) -> dict[str, TensorInfo]:
    """Name, full shape and dtype of what `hf_stream` yields for this stage, in order; no communication."""
    parameters = named_parameters(model)
    return {
        name: TensorInfo(shape, dtype or parameters[entry.name].dtype)
        for entry in emitted(model, spec, role).values()
        for name, shape in entry.hf
    }


def _pieces(
    model: nn.Module, spec: ModelSpec, role: Role, dtype: torch.dtype | None, bucket_bytes: int, tp: int
) -> Iterator[list[_Piece]]:
    """Parameters in buckets of one dtype whose merged size stays within `bucket_bytes` where a single one does."""
    parameters = named_parameters(model)
    bucket: list[_Piece] = []
    filled = 0
    for entry in emitted(model, spec, role).values():
        piece = _Piece(entry, parameters[entry.name])
        size = piece.parameter.numel() * tp * (dtype or piece.parameter.dtype).itemsize
        mixed = bucket and dtype is None and bucket[0].parameter.dtype != piece.parameter.dtype
        if bucket and (mixed or filled + size > bucket_bytes):
            yield bucket
            bucket, filled = [], 0
        bucket.append(piece)
        filled += size
    if bucket:
        yield bucket


@torch.no_grad()
def hf_stream(
    model: nn.Module,
    spec: ModelSpec,
    *,
    tp_group: dist.ProcessGroup | None,
    role: Role = "actor",
    dtype: torch.dtype | None = None,
    bucket_bytes: int = 256 << 20,
    everywhere: bool = False,
) -> Iterator[Bucket]:
    """Full Hugging Face tensors of this pipeline stage, bucket by bucket, in table order.

    Collective over `tp_group` only: all its ranks iterate to the end, other groups are not involved (with data
    parallelism its first rank's group is enough). One flat gather a bucket; while a bucket is consumed the next is
    on its way. A rank holds its shard, one bucket that is consumed and one in flight.

    Args:
        model: GPTModel of any stage, plain or wrapped.
        tp_group: the model's tensor-parallel group; None for a model on one rank.
        dtype: dtype of the tensors; None keeps each parameter's.
        bucket_bytes: size of a bucket of full tensors; a larger tensor travels alone.
        everywhere: give the tensors to every tp rank (as many bytes received on each) instead of the first only.

    Yields:
        (name, tensor) pairs; empty lists on ranks that receive nothing. Vocabulary padding is cut off and a tied
        embedding appears once. Tensors may be views of parameters or of the bucket: copy what outlives the step.
    """
    tp = 1 if tp_group is None else tp_group.size()
    ahead: _Gather | None = None
    for pieces in _pieces(model, spec, role, dtype, bucket_bytes, tp):
        bucket = ahead.tensors(spec) if ahead is not None else None
        ahead = None  # frees what was received before the next bucket needs its room
        ahead = _Gather(pieces, tp_group, dtype, everywhere)
        if bucket is not None:
            yield bucket
            del bucket
    if ahead is not None:
        yield ahead.tensors(spec)
