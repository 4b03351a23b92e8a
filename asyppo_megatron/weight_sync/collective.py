"""One stage's sender: its groups with the engines, and buckets through them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from asyppo_megatron.weight_sync.buckets import Bucket, BucketPlan
from asyppo_megatron.weight_sync.engines import EngineError, EngineRefusal, Request
from asyppo_megatron.weight_sync.groups import UpdateGroup

log = logging.getLogger(__name__)

MAX_GROUP_GPUS = 64


@dataclass(frozen=True)
class GroupPlan:
    """Engines that one sender reaches by one broadcast.

    Attributes:
        key: of the group; another one when any of its engines is another process.
        engines: (url, tp size).
    """

    key: str
    engines: tuple[tuple[str, int], ...]


def plan_groups(engines: Sequence[tuple[str, int, str]], limit: int = MAX_GROUP_GPUS) -> list[GroupPlan]:
    """Engines in groups of at most `limit` GPUs.

    Args:
        engines: (url, tp size, incarnation).
    """
    groups: list[list[tuple[str, int, str]]] = []
    filled = limit
    for engine in sorted(engines):
        if filled + engine[1] > limit:
            groups.append([])
            filled = 0
        groups[-1].append(engine)
        filled += engine[1]
    return [GroupPlan(repr(g), tuple((url, tp) for url, tp, _ in g)) for g in groups]


class Turns:
    """Who sends next to a group: bucket after bucket, stage after stage.

    Engines serve one update at a time, in the order of their requests. Two senders at once to the same engines would
    wait for each other for ever when two engines met their requests in different order. So the stages gather side by
    side and take turns to send; where there are several groups, each begins with another stage and all are busy.

    Args:
        store: shared by the senders.
        prefix: of the keys, unique to a pass and group.
        stages: buckets that each stage sends.
        first: the stage that begins.
    """

    def __init__(self, store: dist.Store, prefix: str, stages: Sequence[int], first: int):
        order = [(first + i) % len(stages) for i in range(len(stages))]
        self._turns = [(k, s) for k in range(max(stages)) for s in order if k < stages[s]]
        self._store, self._prefix = store.clone(), prefix  # a wait holds its connection against every other use

    def wait(self, index: int, stage: int) -> None:
        at = self._turns.index((index, stage))
        if at and self._turns[at - 1][1] != stage:
            self._store.wait([f"{self._prefix}/{at - 1}"])

    def done(self, index: int, stage: int) -> None:
        at = self._turns.index((index, stage))
        if at + 1 < len(self._turns) and self._turns[at + 1][1] != stage:
            self._store.set(f"{self._prefix}/{at}", b"1")


@dataclass
class CollectiveSender:
    """Sends a stage's buckets to all groups at once, each in a thread of its own.

    Attributes:
        stage: pipeline stage of this sender.
        name: prefix of the groups' names, unique to the run.
        send: brings a bucket's bytes to a group.
    """

    stage: int
    name: str
    device: torch.device
    timeout_s: float
    send: Callable[[UpdateGroup, Tensor], None] = lambda group, flat: group.broadcast(flat)
    _groups: dict[str, UpdateGroup] = field(default_factory=dict)
    _made: int = 0
    _threads: dict[str, ThreadPoolExecutor] = field(default_factory=dict)
    errors: dict[str, EngineError] = field(default_factory=dict)

    def prepare(self, plans: Sequence[GroupPlan], keep: Sequence[GroupPlan]) -> None:
        """Make the groups of a pass that do not exist yet; leave those that no plan names any more.

        A group that cannot be made is noted in `errors`.
        """
        self.errors = {}
        wanted = {p.key for p in (*plans, *keep)}
        for key in [k for k in self._groups if k not in wanted]:
            self._groups.pop(key).close()
        for key in [k for k in self._threads if k not in wanted]:
            self._threads.pop(key).shutdown()
        for plan in plans:
            if plan.key not in self._threads:
                self._threads[plan.key] = ThreadPoolExecutor(1, thread_name_prefix="weight-sync")
            if plan.key in self._groups:
                continue
            self._made += 1
            name = f"{self.name}-{self.stage}-{self._made}"
            try:
                self._groups[plan.key] = UpdateGroup(
                    name, list(plan.engines), device=self.device, timeout_s=self.timeout_s
                )
            except (EngineError, RuntimeError) as e:  # RuntimeError: torch's, of a rendezvous that failed
                self._fail(plan.key, e)

    def start(self, bucket: Bucket, index: int, plans: Sequence[GroupPlan], turns: Sequence[Turns]) -> None:
        """Begin to send a bucket; it is `busy` until every group has it or has failed."""
        for plan, turn in zip(plans, turns, strict=True):
            thread = self._threads[plan.key]
            bucket.busy.append(thread.submit(self._send, plan, turn, bucket.plan, bucket.flat, index))

    def _send(self, plan: GroupPlan, turn: Turns, bucket: BucketPlan, flat: Tensor, index: int) -> None:
        try:
            turn.wait(index, self.stage)
            if plan.key not in self.errors:
                self._broadcast(self._groups[plan.key], bucket, flat)
        except (EngineError, RuntimeError) as e:
            self._fail(plan.key, e)
        finally:
            turn.done(index, self.stage)

    def _broadcast(self, group: UpdateGroup, bucket: BucketPlan, flat: Tensor) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        body = describe_bucket(bucket) | {"group_name": group.name, "flush_cache": False}
        requests = [Request(u, "POST", "/update_weights_from_distributed", body, self.timeout_s) for u in group.urls]
        self.send(group, flat)
        for request in requests:
            request.answer()

    def _fail(self, key: str, error: Exception) -> None:
        """Note an error and leave the group: what its engines wait for will not come."""
        lost = not isinstance(error, EngineRefusal) or "Failed to receive" in str(error)
        self.errors[key] = EngineError(str(error) or repr(error), lost=lost)  # without the frames of the failed call
        log.warning("weight sync: stage %d: %s", self.stage, error)
        if (group := self._groups.pop(key, None)) is not None:
            group.close()

    def close(self) -> None:
        for group in self._groups.values():
            group.close()
        self._groups.clear()
        for thread in self._threads.values():
            thread.shutdown()
        self._threads.clear()


def describe_bucket(plan: BucketPlan) -> dict[str, Any]:
    """A bucket's tensors as SGLang's requests name them."""
    return {
        "names": [s.name for s in plan.slots],
        "dtypes": [str(s.dtype).removeprefix("torch.") for s in plan.slots],
        "shapes": [list(s.shape) for s in plan.slots],
        "load_format": "flattened_bucket",
    }
