"""The actor's weights into SGLang engines: who does what, in which order, and what happens when an engine fails.

One rank leads (tp 0, dp 0 of the first stage): it speaks the protocol with the engines and tells the others what to
do through the run's store. One rank a stage sends (tp 0, dp 0); the other tp ranks give it their parts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from asyppo_megatron.convert.export import emitted, stage_tensors
from asyppo_megatron.convert.stages import leads
from asyppo_megatron.models.spec import ModelSpec
from asyppo_megatron.types import RunError
from asyppo_megatron.weight_sync.buckets import Bucket
from asyppo_megatron.weight_sync.checksum import Checksums, Sample, add_checksums
from asyppo_megatron.weight_sync.devices import own_gpu
from asyppo_megatron.weight_sync.disk import push_to_directory
from asyppo_megatron.weight_sync.engines import EngineTarget
from asyppo_megatron.weight_sync.lead import Lead
from asyppo_megatron.weight_sync.orders import ATTEMPTS, ActorRank, Order, SyncError, SyncOptions
from asyppo_megatron.weight_sync.protocol import EngineSessions
from asyppo_megatron.weight_sync.sender import BucketSender

if TYPE_CHECKING:
    from asyppo_megatron.parallel.process_groups import RoleGroups


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
        self._rank = ActorRank(groups, spec, store, device, options, name)
        self._count, self._talks = 0, 0
        self.is_lead = leads(groups)
        store.set(f"{name}/rank/{dist.get_rank()}", json.dumps({"gpu": own_gpu(device)}))
        self._sessions = EngineSessions(options, targets) if self.is_lead else None
        self.sender = BucketSender(self._rank)

    def push(self, model: nn.Module, policy_version: int) -> dict[str, Any]:
        """Bring every engine to `policy_version`; all have it, proven as configured, when this returns.

        Engines that have it from an earlier push are left alone.

        Returns:
            What was done: seconds, bytes, engines, parameters compared. The same on every rank.

        Raises:
            SyncError: on every rank.
        """
        self._count += 1
        prefix = f"{self._rank.name}/{self._count}"
        self._forget()
        lead = Lead(self._rank, self._sessions, prefix, policy_version) if self._sessions is not None else None
        if lead is not None:
            lead.begin()
        attempt = 0
        while True:
            order = Order.parse(self._rank.store.get(f"{prefix}/order/{attempt}"))
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

    def close(self) -> None:
        """Leave every group; no collectives of the trainer, so it serves after an error too."""
        self.sender.close()

    def _from_lead(self, what: str, action: Callable[[EngineSessions], None]) -> None:
        """The lead acts, and tells the others how it went."""
        self._talks += 1
        store, name = self._rank.store, self._rank.name
        key = f"{name}/{what}/{self._talks}"
        if self._sessions is not None:
            error = ""
            try:
                action(self._sessions)
            except RunError as e:
                error = str(e)
            store.set(key, json.dumps(error))
            store.delete_key(f"{name}/{what}/{self._talks - 4}")
        if text := json.loads(store.get(key)):
            raise SyncError(text)

    def _follow(self, order: Order, model: nn.Module, policy_version: int, prefix: str) -> None:
        """Do what the lead ordered and report what came of it."""
        found: Checksums = {}
        sample = Sample(self._rank.options.checksum, self._rank.spec, policy_version)
        report: dict[str, Any] = {}
        if order.step == "disk":
            report = self._write(order, model, policy_version, found, sample)
        elif self.sender.takes_part(order):
            report = self.sender.send(order, model, prefix, lambda b: self._check(b, found, sample, order.sizes))
        if self._rank.sends:
            report |= {"checksums": found}
            self._rank.store.set(f"{prefix}/report/{order.attempt}/{self._rank.stage}", json.dumps(report))

    def _write(
        self, order: Order, model: nn.Module, policy_version: int, found: Checksums, sample: Sample
    ) -> dict[str, Any]:
        """This version into the directory that engines read, with checksums of what is written added to `found`."""
        rank = self._rank
        entries = emitted(model, rank.spec, "actor")
        assert rank.options.directory is not None

        def observe(bucket: Sequence[tuple[str, Tensor]]) -> None:
            tensors = dict(bucket)
            held = [(e, [tensors[n] for n, _ in e.hf]) for e in entries.values() if e.hf[0][0] in tensors]
            add_checksums(found, held, sample, order.sizes, rank.spec)

        push_to_directory(
            model,
            rank.spec,
            rank.options.directory,
            policy_version,
            rank.groups,
            dtype=order.torch_dtype,
            bucket_bytes=rank.options.bucket_bytes,
            observe=observe,
        )
        written = stage_tensors(model, rank.spec, "actor", order.torch_dtype).values()
        return {"bytes": sum(math.prod(t.shape) * t.dtype.itemsize for t in written)}

    def _check(self, bucket: Bucket, found: Checksums, sample: Sample, sizes: Sequence[int]) -> None:
        held = [(entry, [s.view(bucket.flat) for s in slots]) for entry, slots in bucket.plan.entries]
        add_checksums(found, held, sample, sizes, self._rank.spec)

    def _forget(self) -> None:
        """Drop the keys of the push before the last: nobody reads them any more."""
        store, old = self._rank.store, f"{self._rank.name}/{self._count - 2}"
        if self.is_lead and self._count > 2:
            for attempt in range(ATTEMPTS + 1):
                store.delete_key(f"{old}/order/{attempt}")
                for stage in range(self._rank.num_stages):
                    store.delete_key(f"{old}/report/{attempt}/{stage}")
                    store.delete_key(f"{old}/buckets/{attempt}/{stage}")
