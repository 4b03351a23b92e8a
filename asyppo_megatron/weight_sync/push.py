"""The actor's weights into SGLang engines: who does what, in which order, and what happens when an engine fails.

One rank leads (tp 0, dp 0 of the first stage): it speaks the protocol with the engines and tells the others what to
do through the run's store. One rank a stage sends (tp 0, dp 0); the other tp ranks give it their parts.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from asyppo_megatron.convert.export import emitted, stage_tensors
from asyppo_megatron.convert.stages import leads
from asyppo_megatron.models.spec import ModelSpec
from asyppo_megatron.parallel.process_groups import RoleGroups
from asyppo_megatron.types import RunError
from asyppo_megatron.weight_sync import ipc
from asyppo_megatron.weight_sync.buckets import Bucket, BucketStream
from asyppo_megatron.weight_sync.checksum import Checksums, Sample, add_checksums, merge
from asyppo_megatron.weight_sync.collective import CollectiveSender, GroupPlan, Turns
from asyppo_megatron.weight_sync.devices import own_gpu
from asyppo_megatron.weight_sync.disk import push_to_directory
from asyppo_megatron.weight_sync.engines import EngineError, EngineTarget
from asyppo_megatron.weight_sync.protocol import EngineSessions

log = logging.getLogger(__name__)

_ATTEMPTS = 3


class SyncError(RunError):
    """A weight sync that failed, as the leading rank tells it to every rank."""


@dataclass(frozen=True)
class SyncOptions:
    """How to sync.

    Attributes:
        transport: "auto", "disk", "collective" or "ipc".
        bucket_bytes: size of a bucket.
        checksum: "full", "sampled" or "off".
        timeout_s: longest wait for an answer, a broadcast, or an engine that restarts.
        pause_mode: what happens to requests under way: "abort", "retract" or "in_place" (SGLang's words).
        directory: of the disk transport.
        colocated: the engines share the training ranks' devices: `release` before training, `wake` after a push.
    """

    transport: str
    bucket_bytes: int
    checksum: str
    timeout_s: float
    pause_mode: str = "retract"
    directory: Any = None
    colocated: bool = False


@dataclass(frozen=True)
class _Order:
    """What the lead tells all ranks to do next."""

    step: str  # "disk", "pass" or "end"
    attempt: int = 0
    dtype: str = ""
    sizes: tuple[int, ...] = ()
    groups: tuple[GroupPlan, ...] = ()
    kept: tuple[GroupPlan, ...] = ()
    neighbours: tuple[ipc.Neighbour, ...] = ()
    error: str = ""
    stats: dict[str, Any] | None = None

    @classmethod
    def parse(cls, text: bytes) -> _Order:
        raw = json.loads(text)
        for name in ("groups", "kept"):
            raw[name] = tuple(GroupPlan(g["key"], tuple((url, tp) for url, tp in g["engines"])) for g in raw[name])
        raw["neighbours"] = tuple(ipc.Neighbour(n["url"], tuple(n["owners"])) for n in raw["neighbours"])
        raw["sizes"] = tuple(raw["sizes"])
        return cls(**raw)


class EngineSync:
    """Pushes versions of the actor's weights. Every method is called by every rank of the actor, in the same order.

    Args:
        groups: of the actor.
        store: of the run.
        targets: the engines there are for a version; called on the leading rank.
        name: of the run; part of the names of groups and keys.
    """

    def __init__(
        self,
        groups: RoleGroups,
        spec: ModelSpec,
        store: dist.Store,
        device: torch.device,
        options: SyncOptions,
        *,
        targets: Callable[[int], Sequence[EngineTarget]],
        name: str,
    ):
        self.groups, self.spec, self.store, self.device, self.options = groups, spec, store, device, options
        self.name, self._count, self._talks = name, 0, 0
        at = groups.at
        self.is_lead = leads(groups)
        self._streams = at.dp == 0 and at.cp == 0
        self.sends = self._streams and at.tp == 0
        where = {"gpu": own_gpu(device)}
        store.set(f"{name}/rank/{dist.get_rank()}", json.dumps(where))
        self.sessions = EngineSessions(options, targets) if self.is_lead else None
        self.collective = CollectiveSender(at.pp, name, device, options.timeout_s) if self.sends else None
        self._poster_store = store.clone()  # a wait holds its connection against every other use
        self._poster = ThreadPoolExecutor(1, thread_name_prefix="weight-sync-ipc")

    def push(self, model: nn.Module, policy_version: int) -> dict[str, Any]:
        """Bring every engine to `policy_version`; all have it, proven as configured, when this returns.

        Returns:
            What was done: seconds, bytes, engines, parameters compared. The same on every rank.

        Raises:
            SyncError: on every rank.
        """
        self._count += 1
        prefix = f"{self.name}/{self._count}"
        self._forget()
        began = time.perf_counter()
        lead = _Lead(self, prefix, policy_version, began) if self.is_lead else None
        if lead is not None:
            lead.begin()
        attempt = 0
        while True:
            order = _Order.parse(self.store.get(f"{prefix}/order/{attempt}"))
            if order.error:
                raise SyncError(order.error)
            if order.step == "end":
                return order.stats or {}
            self._follow(order, model, policy_version, prefix)
            if lead is not None:
                lead.decide(order)
            attempt += 1

    def release(self) -> None:
        """Have colocated engines give up their memory; returns on every rank of the actor when they have."""
        self._from_lead("release", lambda sessions: sessions.release())

    def wake(self) -> None:
        """Have colocated engines take their memory and generate; call it when every rank has moved out."""
        self._from_lead("wake", lambda sessions: sessions.wake())

    def _from_lead(self, what: str, action: Callable[[EngineSessions], None]) -> None:
        """The lead acts, and tells the others how it went."""
        self._talks += 1
        key = f"{self.name}/{what}/{self._talks}"
        if self.sessions is not None:
            error = ""
            try:
                action(self.sessions)
            except RunError as e:
                error = str(e)
            self.store.set(key, json.dumps(error))
            self.store.delete_key(f"{self.name}/{what}/{self._talks - 4}")
        if text := json.loads(self.store.get(key)):
            raise SyncError(text)

    def _follow(self, order: _Order, model: nn.Module, policy_version: int, prefix: str) -> None:
        """Do what the lead ordered and report what came of it."""
        found: Checksums = {}
        sample = Sample(self.options.checksum, self.spec, policy_version)
        dtype = getattr(torch, order.dtype, None)
        report: dict[str, Any] = {}
        if order.step == "disk":
            entries = emitted(model, self.spec, "actor")

            def observe(bucket: Sequence[tuple[str, Tensor]]) -> None:
                tensors = dict(bucket)
                held = [(e, [tensors[n] for n, _ in e.hf]) for e in entries.values() if e.hf[0][0] in tensors]
                add_checksums(found, held, sample, order.sizes, self.spec)

            push_to_directory(
                model,
                self.spec,
                self.options.directory,
                policy_version,
                self.groups,
                dtype=dtype,
                bucket_bytes=self.options.bucket_bytes,
                observe=observe,
            )
            written = stage_tensors(model, self.spec, "actor", dtype).values()
            report["bytes"] = sum(math.prod(t.shape) * t.dtype.itemsize for t in written)
        elif self._streams or self._broadcasts(order):
            report = self._send(order, model, dtype, prefix, lambda b: self._check(b, found, sample, order.sizes))
        if self.sends:
            report |= {"checksums": found}
            self.store.set(f"{prefix}/report/{order.attempt}/{self.groups.at.pp}", json.dumps(report))

    def _check(self, bucket: Bucket, found: Checksums, sample: Sample, sizes: Sequence[int]) -> None:
        held = [(entry, [s.view(bucket.flat) for s in slots]) for entry, slots in bucket.plan.entries]
        add_checksums(found, held, sample, sizes, self.spec)

    def _broadcasts(self, order: _Order) -> bool:
        """Whether buckets go to every rank of the actor first: GPU memory can only be shared on the same GPU."""
        return bool(order.neighbours) and self.device.type == "cuda" and self.groups.role.size() > 1

    def _send(
        self, order: _Order, model: nn.Module, dtype: torch.dtype | None, prefix: str, check: Callable[[Bucket], None]
    ) -> dict[str, Any]:
        shared = bool(order.neighbours) and self.device.type != "cuda"
        stream = BucketStream(
            model,
            self.spec,
            tp_group=self.groups.collection.tp,
            dtype=dtype,
            bucket_bytes=self.options.bucket_bytes,
            allocate=ipc.allocate_shared if shared else self._allocate,
        )
        if self._broadcasts(order):
            return self._send_through_all(order, stream, prefix, check)
        if not self.sends:
            for _ in stream:
                pass
            return {}
        assert self.collective is not None
        turns = self._prepare(order, stream, prefix)
        refused: list[str] = []
        for index, bucket in enumerate(stream):
            assert bucket is not None
            self.collective.start(bucket, index, order.groups, turns)
            if order.neighbours:
                key = f"{prefix}/ipc/{order.attempt}/{self.groups.at.pp}/{index}"
                bucket.busy.append(self._poster.submit(self._post, bucket, order, key, refused))
            check(bucket)
        return {"errors": self._errors(), "refused": refused, "bytes": stream.num_bytes}

    def _prepare(self, order: _Order, stream: BucketStream, prefix: str) -> list[Turns]:
        """Make the groups, and agree with the other stages on turns."""
        assert self.collective is not None
        stage, stages = self.groups.at.pp, self.groups.layout.pp
        key = f"{prefix}/buckets/{order.attempt}"
        self.store.set(f"{key}/{stage}", str(len(stream.plans)))
        self.collective.prepare(order.groups, order.kept)
        counts = [int(self.store.get(f"{key}/{s}")) for s in range(stages)]
        return [
            Turns(self.store, f"{prefix}/turn/{order.attempt}/{number}", counts, number % stages)
            for number in range(len(order.groups))
        ]

    def _post(self, bucket: Bucket, order: _Order, key: str, refused: list[str], is_sender: bool = True) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        try:
            ipc.send_bucket(
                bucket.plan,
                bucket.flat,
                order.neighbours,
                is_sender=is_sender,
                store=self._poster_store,
                prefix=key,
                timeout_s=self.options.timeout_s,
            )
        except (EngineError, RuntimeError) as e:
            refused.append(str(e))

    def _send_through_all(
        self, order: _Order, stream: BucketStream, prefix: str, check: Callable[[Bucket], None]
    ) -> dict[str, Any]:
        """Stage after stage, every bucket to all ranks of the actor, each of which serves the engine beside it."""
        role, rank = self.groups.role, dist.get_rank()
        own = {"plans": stream.plans if self.sends else None, "stage": self.groups.at.pp, "rank": rank}
        everyone: list[Any] = [None] * role.size()
        dist.all_gather_object(everyone, own, group=role)
        senders = sorted((o for o in everyone if o["plans"] is not None), key=lambda o: o["stage"])
        turns = self._prepare(order, stream, prefix) if self.sends else []
        size = max(p.num_bytes for o in senders for p in o["plans"])
        buffers = [self._allocate(size) for _ in range(2)]
        users: list[Bucket | None] = [None, None]
        refused: list[str] = []
        number = 0
        for sender in senders:
            mine = iter(stream) if self._streams and self.groups.at.pp == sender["stage"] else None
            for index, plan in enumerate(sender["plans"]):
                gathered = next(mine) if mine is not None else None
                slot = number % 2
                if (last := users[slot]) is not None:
                    for user in last.busy:
                        user.exception()
                flat = gathered.flat if gathered is not None else buffers[slot][: plan.num_bytes]
                dist.broadcast(flat, src=sender["rank"], group=role)
                bucket = gathered or Bucket(plan, flat)
                if gathered is not None and self.collective is not None:
                    self.collective.start(bucket, index, order.groups, turns)
                torch.cuda.current_stream(self.device).synchronize()  # an engine reads the memory, not the stream
                key = f"{prefix}/ipc/{order.attempt}/{sender['stage']}/{index}"
                bucket.busy.append(self._poster.submit(self._post, bucket, order, key, refused, sender["rank"] == rank))
                if gathered is not None:
                    check(bucket)
                users[slot] = bucket
                number += 1
            if mine is not None:
                next(mine, None)
        for last in users:
            for user in last.busy if last is not None else ():
                user.exception()
        everyone_refused: list[Any] = [None] * role.size()
        dist.all_gather_object(everyone_refused, refused, group=role)
        refused = [r for one in everyone_refused for r in one]
        return {"errors": self._errors(), "refused": refused, "bytes": stream.num_bytes}

    def _errors(self) -> dict[str, Any]:
        if self.collective is None:
            return {}
        return {key: {"text": str(e), "lost": e.lost} for key, e in self.collective.errors.items()}

    def _allocate(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def _forget(self) -> None:
        """Drop the keys of the push before the last: nobody reads them any more."""
        old = f"{self.name}/{self._count - 2}"
        if self.is_lead and self._count > 2:
            for attempt in range(_ATTEMPTS + 1):
                self.store.delete_key(f"{old}/order/{attempt}")
                for stage in range(self.groups.layout.pp):
                    self.store.delete_key(f"{old}/report/{attempt}/{stage}")
                    self.store.delete_key(f"{old}/buckets/{attempt}/{stage}")

    def close(self) -> None:
        """Leave every group; no collectives of the trainer, so it serves after an error too."""
        self._poster.shutdown(wait=False)
        if self.collective is not None:
            self.collective.close()


class _Lead:
    """The leading rank's part of one push: sessions with the engines, orders to the ranks."""

    def __init__(self, sync: EngineSync, prefix: str, policy_version: int, began: float):
        assert sync.sessions is not None
        self.sync, self.prefix, self.version, self.began = sync, prefix, policy_version, began
        self.sessions = sync.sessions
        self.expected: Checksums = {}
        self.attempt = 0
        self.bytes = 0

    def begin(self) -> None:
        self._order(self._open)

    def decide(self, last: _Order) -> None:
        """After a step: another pass for engines that missed it, or the end."""
        self.attempt += 1
        self._order(lambda: self._next(last))

    def _order(self, make: Callable[[], _Order]) -> None:
        """Tell the ranks; an error of ours is theirs too."""
        try:
            order = make()
        except RunError as e:
            order = _Order("end", error=str(e))
        text = json.dumps(asdict(replace(order, attempt=self.attempt)))
        self.sync.store.set(f"{self.prefix}/order/{self.attempt}", text)

    def _open(self) -> _Order:
        self.sessions.open(self.version)
        if not self.sessions.engines:
            return self._end()
        if self.sync.options.transport == "disk":
            return _Order("disk", dtype=self.sessions.dtype, sizes=self.sessions.sizes)
        self.sessions.begin()
        return self._pass(self.sessions.urls)

    def _pass(self, urls: Sequence[str]) -> _Order:
        ranks = {}
        if self.sync.device.type == "cuda":
            for rank in self.sync.groups.layout.ranks:
                ranks[json.loads(self.sync.store.get(f"{self.sync.name}/rank/{rank}"))["gpu"]] = rank
        groups, neighbours = self.sessions.assign(urls, ranks)
        kept = [] if self.attempt == 0 else [g for g in self.sessions.groups if g not in groups]
        if neighbours:
            ipc.require_sglang()
        return _Order(
            "pass",
            dtype=self.sessions.dtype,
            sizes=self.sessions.sizes,
            groups=tuple(groups),
            kept=tuple(kept),
            neighbours=tuple(neighbours),
        )

    def _next(self, last: _Order) -> _Order:
        reports = [self._report(stage) for stage in range(self.sync.groups.layout.pp)]
        if self.attempt == 1:
            self.expected = merge(r["checksums"] for r in reports)
            self.bytes = sum(r["bytes"] for r in reports)
        if last.step == "disk":
            self.sessions.load_from_disk(self.sync.options.directory, self.version)
            return self._end()
        refused = [text for r in reports for text in r["refused"]]
        if refused:
            raise EngineError(refused[0])
        missed = {key: error for r in reports for key, error in r["errors"].items()}
        if not missed:
            return self._end()
        for error in missed.values():
            if not error["lost"] or self.attempt >= _ATTEMPTS:
                raise EngineError(f"weight sync of policy version {self.version}: {error['text']}")
        again = self.sessions.revive([u for g in last.groups if g.key in missed for u, _ in g.engines])
        return self._pass(again) if again else self._end()

    def _report(self, stage: int) -> dict[str, Any]:
        return json.loads(self.sync.store.get(f"{self.prefix}/report/{self.attempt - 1}/{stage}"))

    def _end(self) -> _Order:
        compared = self.sessions.finish(self.version, self.expected, self.sync.spec, self.sync.options.checksum)
        seconds = time.perf_counter() - self.began
        log.info("weight sync: version %d on %d engines in %.2f s", self.version, len(self.sessions.engines), seconds)
        return _Order(
            "end",
            stats={
                "seconds": seconds,
                "bytes": self.bytes,
                "engines": self.sessions.urls,
                "compared": compared,
                "attempts": self.attempt,
            },
        )
