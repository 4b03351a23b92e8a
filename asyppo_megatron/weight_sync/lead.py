"""The leading rank's part of one push: sessions with the engines, orders to the ranks."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from asyppo_megatron.types import RunError
from asyppo_megatron.weight_sync import ipc
from asyppo_megatron.weight_sync.checksum import Checksums, merge
from asyppo_megatron.weight_sync.engines import EngineError
from asyppo_megatron.weight_sync.orders import ATTEMPTS, ActorRank, Order
from asyppo_megatron.weight_sync.protocol import EngineSessions

log = logging.getLogger(__name__)


class Lead:
    """Decides what comes next, from what the engines answer and the senders report.

    Args:
        prefix: of this push's keys in the store.
    """

    def __init__(self, rank: ActorRank, sessions: EngineSessions, prefix: str, policy_version: int):
        self._rank, self._sessions, self._prefix, self._version = rank, sessions, prefix, policy_version
        self._began = time.perf_counter()
        self._expected: Checksums = {}
        self._attempt = 0
        self._bytes = 0

    def begin(self) -> None:
        self._order(self._open)

    def decide(self, last: Order) -> None:
        """After a step: another pass for engines that missed it, or the end."""
        self._attempt += 1
        self._order(lambda: self._next(last))

    def _order(self, make: Callable[[], Order]) -> None:
        """Tell the ranks; an error of ours is theirs too."""
        try:
            order = make()
        except RunError as e:
            order = Order("end", error=str(e))
        self._rank.store.set(f"{self._prefix}/order/{self._attempt}", replace(order, attempt=self._attempt).dump())

    def _open(self) -> Order:
        self._sessions.open(self._version)
        if not self._sessions.engines:
            return self._end()
        if self._rank.options.transport == "disk":
            return Order("disk", dtype=self._sessions.dtype, sizes=self._sessions.sizes)
        self._sessions.begin()
        return self._pass(self._sessions.urls)

    def _pass(self, urls: Sequence[str]) -> Order:
        ranks = {}
        if self._rank.device.type == "cuda":
            for rank in self._rank.groups.layout.ranks:
                ranks[json.loads(self._rank.store.get(f"{self._rank.name}/rank/{rank}"))["gpu"]] = rank
        groups, neighbours = self._sessions.assign(urls, ranks)
        kept = [] if self._attempt == 0 else [g for g in self._sessions.groups if g not in groups]
        if neighbours:
            ipc.require_sglang()
        return Order(
            "pass",
            dtype=self._sessions.dtype,
            sizes=self._sessions.sizes,
            groups=tuple(groups),
            kept=tuple(kept),
            neighbours=tuple(neighbours),
        )

    def _next(self, last: Order) -> Order:
        reports = [self._report(stage) for stage in range(self._rank.num_stages)]
        if self._attempt == 1:
            self._expected = merge(r["checksums"] for r in reports)
            self._bytes = sum(r["bytes"] for r in reports)
        if last.step == "disk":
            assert self._rank.options.directory is not None
            self._sessions.load_from_disk(self._rank.options.directory, self._version)
            return self._end()
        refused = [text for r in reports for text in r["refused"]]
        if refused:
            raise EngineError(refused[0])
        missed = {key: error for r in reports for key, error in r["errors"].items()}
        if not missed:
            return self._end()
        for error in missed.values():
            if not error["lost"] or self._attempt >= ATTEMPTS:
                raise EngineError(f"weight sync of policy version {self._version}: {error['text']}")
        again = self._sessions.revive([u for g in last.groups if g.key in missed for u, _ in g.engines])
        return self._pass(again) if again else self._end()

    def _report(self, stage: int) -> dict[str, Any]:
        return json.loads(self._rank.store.get(f"{self._prefix}/report/{self._attempt - 1}/{stage}"))

    def _end(self) -> Order:
        rank, sessions = self._rank, self._sessions
        compared = sessions.finish(self._version, self._expected, rank.spec, rank.options.checksum)
        seconds = time.perf_counter() - self._began
        log.info("weight sync: version %d on %d engines in %.2f s", self._version, len(sessions.engines), seconds)
        return Order(
            "end",
            stats={
                "seconds": seconds,
                "bytes": self._bytes,
                "engines": sessions.urls,
                "compared": compared,
                "attempts": self._attempt,
            },
        )
