"""A stage's shards as flat buckets of full Hugging Face tensors: the one stream that every transport to engines sends.

A bucket is planned once, by arithmetic on the mapping table. Its bytes are gathered straight to where they lie in
the bucket: what is cut along rows is received in place, only what is cut along columns passes through a temporary
(which counts as part of the bucket). Two buffers go round: one is being sent while the other is gathered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from asyppo_megatron.convert.export import emitted
from asyppo_megatron.convert.names import named_parameters
from asyppo_megatron.convert.rows import Kind
from asyppo_megatron.convert.shards import Span, parts, spans
from asyppo_megatron.convert.table import Entry
from asyppo_megatron.models.spec import ModelSpec

Allocate = Callable[[int], Tensor]


@dataclass(frozen=True)
class Slot:
    """One Hugging Face tensor inside a bucket, from byte `offset` on."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def view(self, flat: Tensor) -> Tensor:
        """The tensor in a bucket's bytes (u8 [n])."""
        return flat[self.offset : self.offset + self.num_bytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class BucketPlan:
    """What travels together.

    Attributes:
        entries: rows of the mapping table, each with its slots.
        num_bytes: of the tensors.
        work_bytes: of the temporary that gathering needs behind them, on the rank that receives.
    """

    entries: tuple[tuple[Entry, tuple[Slot, ...]], ...]
    num_bytes: int
    work_bytes: int

    @property
    def slots(self) -> list[Slot]:
        return [slot for _, slots in self.entries for slot in slots]


@dataclass
class Bucket:
    """A gathered bucket on the rank that sends.

    Whoever goes on reading `flat` after asking for the next bucket says so by `busy`; the buffer is not written
    again before that is done.
    """

    plan: BucketPlan
    flat: Tensor  # u8 [num_bytes]
    busy: list[Future[Any]] = field(default_factory=list)

    def named_tensors(self) -> list[tuple[str, Tensor]]:
        return [(slot.name, slot.view(self.flat)) for slot in self.plan.slots]


def plan_buckets(
    entries: Sequence[Entry], dtypes: Sequence[torch.dtype], *, bucket_bytes: int, tp: int
) -> list[BucketPlan]:
    """Entries in order, cut into buckets of one dtype; those that are larger than a bucket come last.

    The first bucket is gathered before anything is sent: that should not be the embedding.

    Args:
        entries: of the stage.
        dtypes: of each entry's tensors as they are sent.
        bucket_bytes: limit for a bucket with its temporary; an entry that is larger alone has a bucket to itself.
        tp: tensor-parallel ranks that hold the parts.
    """
    plans: list[BucketPlan] = []
    taken: list[tuple[Entry, torch.dtype]] = []
    cost = 0

    def close() -> None:
        nonlocal taken, cost
        if taken:
            plans.append(_plan(taken, tp))
        taken, cost = [], 0

    for entry, dtype in zip(entries, dtypes, strict=True):
        size = _size(entry, dtype) + _work(entry, dtype, tp)
        if taken and (cost + size > bucket_bytes or taken[-1][1] != dtype):
            close()
        taken.append((entry, dtype))
        cost += size
    close()
    return sorted(plans, key=lambda plan: plan.num_bytes + plan.work_bytes > bucket_bytes)  # stable


def _size(entry: Entry, dtype: torch.dtype) -> int:
    return sum(math.prod(shape) for _, shape in entry.hf) * dtype.itemsize


def _work(entry: Entry, dtype: torch.dtype, tp: int) -> int:
    return _size(entry, dtype) // tp * (tp - 1) if entry.kind is Kind.ROW else 0


def _plan(taken: Sequence[tuple[Entry, torch.dtype]], tp: int) -> BucketPlan:
    offset, rows = 0, []
    for entry, dtype in taken:
        slots = []
        for name, shape in entry.hf:
            slots.append(Slot(name, shape, dtype, offset))
            offset += slots[-1].num_bytes
        rows.append((entry, tuple(slots)))
    return BucketPlan(tuple(rows), offset, sum(_work(e, d, tp) for e, d in taken))


class KeptBuffers:
    """Buffers that stay from push to push. On a CPU the pages of fresh ones cost as much time as sending them.

    Args:
        allocate: makes a buffer of so many bytes.
    """

    def __init__(self, allocate: Allocate):
        self._allocate = allocate
        self._held: list[Tensor] = []
        self._taken = 0

    def release(self) -> None:
        """The last push is over: the next one may have its buffers."""
        self._taken = 0

    def __call__(self, num_bytes: int) -> Tensor:
        number, self._taken = self._taken, self._taken + 1
        if number == len(self._held):
            self._held.append(self._allocate(num_bytes))
        elif self._held[number].numel() != num_bytes:
            self._held[number] = self._allocate(num_bytes)
        return self._held[number]


class BucketStream:
    """The buckets of one pipeline stage, gathered to tp rank 0 and handed out one after the other.

    Its memory beside the parameters: two buffers, of the largest buckets that each takes in turn, on tp rank 0; on the
    others at most the parts of one bucket that have to be rearranged or cast before they are sent.

    Args:
        model: GPTModel of the stage, plain or wrapped.
        tp_group: its tensor-parallel group; None for one rank.
        dtype: what the engines hold; None keeps each parameter's.
        bucket_bytes: see `plan_buckets`.
        allocate: makes a buffer of so many bytes (u8); the transport may need a special kind.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: ModelSpec,
        *,
        tp_group: dist.ProcessGroup | None,
        dtype: torch.dtype | None,
        bucket_bytes: int,
        allocate: Allocate,
    ):
        self.spec, self.dtype = spec, dtype
        self.tp = 1 if tp_group is None else tp_group.size()
        self.tp_rank = 0 if tp_group is None else tp_group.rank()
        self._group = tp_group
        self._peers = [] if tp_group is None else [dist.get_global_rank(tp_group, r) for r in range(self.tp)]
        held = named_parameters(model)
        table = emitted(model, spec, "actor")
        self._parameters = {name: held[name].detach() for name in table}
        dtypes = [dtype or held[name].dtype for name in table]
        self.plans = plan_buckets(list(table.values()), dtypes, bucket_bytes=bucket_bytes, tp=self.tp)
        sizes = [max(p.num_bytes + p.work_bytes for p in own) for own in (self.plans[::2], self.plans[1::2]) if own]
        self.buffers = [allocate(size) for size in sizes] if self.sends else []

    @property
    def sends(self) -> bool:
        """Whether this rank gets the buckets."""
        return self.tp_rank == 0

    @property
    def num_bytes(self) -> int:
        """Of all tensors of the stage."""
        return sum(p.num_bytes for p in self.plans)

    def __iter__(self) -> Iterator[Bucket | None]:
        """Buckets on tp rank 0, None on the others. All ranks of the group iterate to the end."""
        if not self.sends:
            yield from self._give()
            return
        users: list[list[Future[Any]]] = [[], []]
        for index, plan in enumerate(self.plans):
            slot = index % 2
            for user in users[slot]:
                user.exception()  # waits; what went wrong is its owner's to tell
            _gather(self, plan, self.buffers[slot])
            bucket = Bucket(plan, self.buffers[slot][: plan.num_bytes])
            yield bucket
            users[slot] = bucket.busy
        for user in (u for both in users for u in both):
            user.exception()

    def _give(self) -> Iterator[None]:
        """The other ranks' side: send the parts of each bucket, one bucket ahead at most."""
        last: tuple[list[dist.Work], list[Tensor]] = ([], [])
        for plan in self.plans:
            mine = [part for entry, _ in plan.entries for _, part in self.parts(entry)]
            mine = [p.reshape(-1).to(self.dtype or p.dtype) for p in mine]
            for work in last[0]:
                work.wait()
            ops = [dist.P2POp(dist.isend, part, self._peers[0], self._group) for part in mine]
            last = (dist.batch_isend_irecv(ops) if ops else [], mine)
            yield None
        for work in last[0]:
            work.wait()

    def receive(self, place: Tensor, tp_rank: int) -> dist.P2POp:
        return dist.P2POp(dist.irecv, place, self._peers[tp_rank], self._group)

    def spans(self, entry: Entry, tp_rank: int) -> list[Span]:
        return spans(entry.kind, [shape for _, shape in entry.hf], tp_rank, self.tp, self.spec)

    def parts(self, entry: Entry) -> list[tuple[Span, Tensor]]:
        """This rank's parts of an entry's tensors."""
        own = parts(entry.kind, self._parameters[entry.name], self.tp_rank, self.tp, self.spec)
        return list(zip(self.spans(entry, self.tp_rank), own, strict=True))


def _gather(stream: BucketStream, plan: BucketPlan, buffer: Tensor) -> None:
    """One bucket into a buffer of tp rank 0; the last one is on its way to the engines meanwhile."""
    flat, work = buffer[: plan.num_bytes], buffer[plan.num_bytes :]
    late: list[tuple[Tensor, Tensor]] = []
    ops = []
    used = 0
    for rank in range(1, stream.tp):  # in the order in which each rank sends
        for entry, slots in plan.entries:
            for span in stream.spans(entry, rank):
                target = slots[span.tensor].view(flat).narrow(span.dim, span.start, span.length)
                place = target
                if not target.is_contiguous():
                    size = target.numel() * target.itemsize
                    place = work[used : used + size].view(target.dtype).view(target.shape)
                    used += size
                    late.append((target, place))
                ops.append(stream.receive(place.view(-1), rank))
    works = dist.batch_isend_irecv(ops) if ops else []
    for entry, slots in plan.entries:
        for span, part in stream.parts(entry):
            target = slots[span.tensor].view(flat).narrow(span.dim, span.start, span.length)
            target.view(part.shape).copy_(part) if span.dim == 0 else target.copy_(part)
    for w in works:
        w.wait()
    for target, place in late:
        target.copy_(place)
