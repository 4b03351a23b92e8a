"""A rank's part of one pass: its stage's buckets, gathered, and handed to groups of engines and engines beside it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from asyppo_megatron.weight_sync import ipc
from asyppo_megatron.weight_sync.buckets import Allocate, Bucket, BucketStream, KeptBuffers
from asyppo_megatron.weight_sync.collective import CollectiveSender, Turns
from asyppo_megatron.weight_sync.engines import EngineError
from asyppo_megatron.weight_sync.orders import ActorRank, Order


class BucketSender:
    """Every rank of the actor has one; what it does depends on where the rank stands and where the engines are.

    Attributes:
        collective: groups with engines on other devices; None on ranks that only give their parts.
    """

    def __init__(self, rank: ActorRank):
        self._rank = rank
        sends, timeout_s = rank.sends, rank.options.timeout_s
        self.collective = CollectiveSender(rank.stage, rank.name, rank.device, timeout_s) if sends else None
        self._kept = KeptBuffers(self._allocate)
        self._poster_store = rank.store.clone()  # a wait holds its connection against every other use
        self._poster = ThreadPoolExecutor(1, thread_name_prefix="weight-sync-ipc")

    def close(self) -> None:
        self._poster.shutdown(wait=False)
        if self.collective is not None:
            self.collective.close()

    def takes_part(self, order: Order) -> bool:
        return self._rank.streams or self._reaches_all(order)

    def send(self, order: Order, model: nn.Module, prefix: str, check: Callable[[Bucket], None]) -> dict[str, Any]:
        """All buckets to all engines of a pass.

        Args:
            prefix: of this push's keys in the store.
            check: is shown every bucket while it is on its way.

        Returns:
            On a sender: errors by group, refusals of engines beside it, bytes.
        """
        stream = BucketStream(
            model,
            self._rank.spec,
            tp_group=self._rank.groups.collection.tp,
            dtype=order.torch_dtype,
            bucket_bytes=self._rank.options.bucket_bytes,
            allocate=self._memory(order),
        )
        if self._reaches_all(order):
            return self._send_through_all(order, stream, prefix, check)
        if not self._rank.sends:
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
                key = f"{prefix}/ipc/{order.attempt}/{self._rank.stage}/{index}"
                bucket.busy.append(self._poster.submit(self._post, bucket, order, key, refused))
            check(bucket)
        return {"errors": self._errors(), "refused": refused, "bytes": stream.num_bytes}

    def _reaches_all(self, order: Order) -> bool:
        """Whether buckets go to every rank of the actor first: GPU memory can only be shared on the same GPU."""
        return bool(order.neighbours) and self._rank.device.type == "cuda" and self._rank.groups.role.size() > 1

    def _prepare(self, order: Order, stream: BucketStream, prefix: str) -> list[Turns]:
        """Make the groups, and agree with the other stages on turns."""
        assert self.collective is not None
        store, stages = self._rank.store, self._rank.num_stages
        key = f"{prefix}/buckets/{order.attempt}"
        store.set(f"{key}/{self._rank.stage}", str(len(stream.plans)))
        self.collective.prepare(order.groups, order.kept)
        counts = [int(store.get(f"{key}/{s}")) for s in range(stages)]
        return [
            Turns(store, f"{prefix}/turn/{order.attempt}/{number}", counts, number % stages)
            for number in range(len(order.groups))
        ]

    def _post(self, bucket: Bucket, order: Order, key: str, refused: list[str], is_sender: bool = True) -> None:
        if self._rank.device.type == "cuda":
            torch.cuda.set_device(self._rank.device)
        try:
            ipc.send_bucket(
                bucket.plan,
                bucket.flat,
                order.neighbours,
                is_sender=is_sender,
                store=self._poster_store,
                prefix=key,
                timeout_s=self._rank.options.timeout_s,
            )
        except (EngineError, RuntimeError) as e:
            refused.append(str(e))

    def _send_through_all(
        self, order: Order, stream: BucketStream, prefix: str, check: Callable[[Bucket], None]
    ) -> dict[str, Any]:
        """Stage after stage, every bucket to all ranks of the actor, each of which serves the engine beside it."""
        role, rank = self._rank.groups.role, dist.get_rank()
        own = {"plans": stream.plans if self._rank.sends else None, "stage": self._rank.stage, "rank": rank}
        senders = sorted((o for o in _gather(own, role) if o["plans"] is not None), key=lambda o: o["stage"])
        turns = self._prepare(order, stream, prefix) if self._rank.sends else []
        size = max(p.num_bytes for o in senders for p in o["plans"])
        buffers = [self._allocate(size) for _ in range(2)]
        users: list[Bucket | None] = [None, None]
        refused: list[str] = []
        number = 0
        for sender in senders:
            mine = iter(stream) if self._rank.streams and self._rank.stage == sender["stage"] else None
            for index, plan in enumerate(sender["plans"]):
                gathered = next(mine) if mine is not None else None
                slot = number % 2
                _wait_for(users[slot])
                flat = gathered.flat if gathered is not None else buffers[slot][: plan.num_bytes]
                dist.broadcast(flat, src=sender["rank"], group=role)
                bucket = gathered or Bucket(plan, flat)
                if gathered is not None and self.collective is not None:
                    self.collective.start(bucket, index, order.groups, turns)
                # An engine reads the memory, not the stream.
                torch.cuda.current_stream(self._rank.device).synchronize()
                key = f"{prefix}/ipc/{order.attempt}/{sender['stage']}/{index}"
                bucket.busy.append(self._poster.submit(self._post, bucket, order, key, refused, sender["rank"] == rank))
                if gathered is not None:
                    check(bucket)
                users[slot] = bucket
                number += 1
            if mine is not None:
                next(mine, None)
        for last in users:
            _wait_for(last)
        refused = [text for one in _gather(refused, role) for text in one]
        return {"errors": self._errors(), "refused": refused, "bytes": stream.num_bytes}

    def _errors(self) -> dict[str, Any]:
        if self.collective is None:
            return {}
        return {key: {"text": str(e), "lost": e.lost} for key, e in self.collective.errors.items()}

    def _memory(self, order: Order) -> Allocate:
        """Where buckets are gathered. A GPU's allocator keeps freed memory, and training may need it meanwhile."""
        if self._rank.device.type == "cuda":
            return self._allocate
        if order.neighbours:
            return ipc.allocate_shared
        self._kept.release()
        return self._kept

    def _allocate(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._rank.device)


def _gather(item: Any, group: dist.ProcessGroup) -> list[Any]:
    """Every rank's item, on every rank of the group."""
    items: list[Any] = [None] * group.size()
    dist.all_gather_object(items, item, group=group)
    return items


def _wait_for(bucket: Bucket | None) -> None:
    for user in bucket.busy if bucket is not None else ():
        user.exception()  # waits; what went wrong is its owner's to tell
