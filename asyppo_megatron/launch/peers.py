"""The launchers of one run on several nodes, through its store: who lives, who failed, who is to stop.

The launcher of node 0 hosts the store. Everything here is polled about once a second and bounded in time; a node
that is alone has no peers and pays nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from asyppo_megatron.launch.failure import Failure, explain

SILENT_S = 60.0  # a launcher that has said nothing for so long is gone
CONNECT_S = 600.0  # nodes of a job start minutes apart where images or environments are read first
_CALL_S = 30.0
_BEAT_S = 5.0
_SETTLE_S = 2.0  # failures of one cause reach the launchers within this time


@dataclass(frozen=True)
class Place:
    """Which of the run's nodes this is, and where they meet.

    Attributes:
        host: of node 0.
        port: of the store on it; 0: one that the kernel chooses (single node only).
    """

    num_nodes: int = 1
    node: int = 0
    host: str = "127.0.0.1"
    port: int = 0

    def ranks(self, num_ranks: int) -> range:
        """World ranks of this node.

        Raises:
            ValueError: the world does not divide over the nodes.
        """
        if num_ranks % self.num_nodes:
            raise ValueError(
                f"nodes: got {self.num_nodes} for {num_ranks} ranks, need a divisor of {num_ranks}; change the number "
                "of nodes or the roles' ranks"
            )
        count = num_ranks // self.num_nodes
        return range(self.node * count, (self.node + 1) * count)


def open_store(place: Place) -> dist.TCPStore:
    """The run's store: made on node 0, joined elsewhere.

    Raises:
        ValueError: the port is taken, or node 0 is not to be found.
    """
    lead = place.node == 0
    patience = timedelta(seconds=_CALL_S if lead else CONNECT_S)
    try:
        store = dist.TCPStore(place.host, place.port, None, lead, patience, wait_for_workers=False)
    except dist.DistError as e:
        what = "cannot listen" if lead else f"no launcher of node 0 within {CONNECT_S:.0f} s"
        raise ValueError(
            f"rendezvous {place.host}:{place.port}: {what} ({str(e).splitlines()[0]}); choose a free port of "
            "node 0 that all nodes can reach"
        ) from e
    store.set_timeout(timedelta(seconds=_CALL_S))
    return store


class Peers:
    """What this launcher hears from the others and tells them.

    Args:
        store: of the run; `place` says whether there is anybody else.
    """

    def __init__(self, store: dist.Store, place: Place):
        self._store, self._place = dist.PrefixStore("launch", store), place
        self._others = [n for n in range(place.num_nodes) if n != place.node]
        self._heard = {n: (0, time.monotonic()) for n in self._others}
        self._next_beat = 0.0

    def poll(self) -> Failure | None:
        """Say that this launcher lives, and hear whether the others do."""
        if not self._others:
            return None
        try:
            return self._poll()
        except dist.DistError:
            return Failure(2, time.time(), "node 0: its launcher ended, or cannot be reached any more")

    def _poll(self) -> Failure | None:
        if self._store.check(["failed"]):
            return self.first_failure([])
        now = time.monotonic()
        if now < self._next_beat:
            return None
        self._next_beat = now + _BEAT_S
        self._store.add(f"alive/{self._place.node}", 1)
        for node in self._others if self._place.node == 0 else [0]:
            count, since = self._heard[node]
            beat = self._store.add(f"alive/{node}", 0)
            done = self._store.check([f"done/{node}"])
            # Until its first word a node may still be starting.
            patience = SILENT_S if beat else CONNECT_S
            if beat != count or done:
                self._heard[node] = (beat, now)
            elif now - since > patience:
                return Failure(0, time.time(), f"node {node}: its launcher has not answered for {now - since:.0f} s")
        return None

    def first_failure(self, own: Sequence[Failure]) -> Failure:
        """Tell the others of a failure, hear theirs, and return the one that explains all."""
        failures = list(own)
        if not self._others:
            return explain(failures)
        try:
            if own:
                text = json.dumps(asdict(explain(own)))
                self._store.set(f"failure/{self._place.node}", text)
                self._store.set("failed", "")
            time.sleep(_SETTLE_S)
            for node in range(self._place.num_nodes):
                if self._store.check([f"failure/{node}"]):
                    failures.append(Failure(**json.loads(self._store.get(f"failure/{node}"))))
        except dist.DistError:  # node 0 has gone: what is known here must do
            failures.append(Failure(3, time.time(), "node 0: its launcher ended, or cannot be reached any more"))
        return explain(failures)

    def announce_stop(self) -> None:
        self._set("stop", "")

    def hears_stop(self) -> bool:
        return self._has("stop")

    def announce_hang(self) -> None:
        self._set("hang", "")

    def hears_hang(self) -> bool:
        return self._has("hang")

    def gather_findings(self, own: list[dict[str, Any]], patience_s: float) -> list[dict[str, Any]]:
        """Findings about the ranks of all nodes that answer in time."""
        findings = list(own)
        self._set(f"findings/{self._place.node}", json.dumps(own))
        missing, deadline = list(self._others), time.monotonic() + patience_s
        while missing and time.monotonic() < deadline:
            for node in [n for n in missing if self._has(f"findings/{n}")]:
                findings += json.loads(self._store.get(f"findings/{node}"))
                missing.remove(node)
            time.sleep(0.1)
        return sorted(findings, key=lambda f: f["rank"])

    @property
    def all_done(self) -> bool:
        """Whether no other launcher needs the store any more; of interest on node 0."""
        return self._place.node != 0 or all(self._has(f"done/{n}") for n in self._others)

    def close(self, patience_s: float = 10.0) -> None:
        """Leave; node 0 lets the others read what they must first."""
        self._set(f"done/{self._place.node}", "")
        deadline = time.monotonic() + patience_s
        while not self.all_done and time.monotonic() < deadline:
            time.sleep(0.1)

    def _set(self, key: str, value: str) -> None:
        if not self._others:
            return
        try:
            self._store.set(key, value)
        except dist.DistError:
            return  # `poll` says what that means

    def _has(self, key: str) -> bool:
        if not self._others:
            return False
        try:
            return bool(self._store.check([key]))
        except dist.DistError:
            return False  # `poll` says what that means
