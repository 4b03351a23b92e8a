"""What one push is made of: options of the run, what a rank knows, and the lead's orders to all ranks."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from asyppo_megatron.models.spec import ModelSpec
from asyppo_megatron.types import RunError
from asyppo_megatron.weight_sync.collective import GroupPlan
from asyppo_megatron.weight_sync.ipc import Neighbour

if TYPE_CHECKING:
    from asyppo_megatron.parallel.process_groups import RoleGroups

ATTEMPTS = 3


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
    directory: Path | None = None
    colocated: bool = False


@dataclass(frozen=True)
class ActorRank:
    """One rank of the actor, as every part of its weight sync sees it.

    Attributes:
        groups: of the actor.
        store: of the run.
        name: of the run; part of the names of groups and keys.
    """

    groups: RoleGroups
    spec: ModelSpec
    store: dist.Store
    device: torch.device
    options: SyncOptions
    name: str

    @property
    def stage(self) -> int:
        return self.groups.at.pp

    @property
    def num_stages(self) -> int:
        return self.groups.layout.pp

    @property
    def streams(self) -> bool:
        """Whether it has a part in the stream of buckets."""
        return self.groups.at.dp == 0 and self.groups.at.cp == 0

    @property
    def sends(self) -> bool:
        """Whether it is the one of its stage that gets the buckets and sends them."""
        return self.streams and self.groups.at.tp == 0


@dataclass(frozen=True)
class Order:
    """What the lead tells all ranks to do next."""

    step: str  # "disk", "pass" or "end"
    attempt: int = 0
    dtype: str = ""
    sizes: tuple[int, ...] = ()
    groups: tuple[GroupPlan, ...] = ()
    kept: tuple[GroupPlan, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()
    error: str = ""
    stats: dict[str, Any] | None = None

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """Of the tensors that are sent."""
        return getattr(torch, self.dtype, None)

    def dump(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: bytes) -> Order:
        raw = json.loads(text)
        for name in ("groups", "kept"):
            raw[name] = tuple(GroupPlan(g["key"], tuple((url, tp) for url, tp in g["engines"])) for g in raw[name])
        raw["neighbours"] = tuple(Neighbour(n["url"], tuple(n["owners"])) for n in raw["neighbours"])
        raw["sizes"] = tuple(raw["sizes"])
        return cls(**raw)
