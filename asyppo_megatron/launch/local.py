"""Starts the ranks of a run on this node: import once, fork, watch, end together.

Importing torch, Megatron-Core and transformers costs about six seconds a process (20 with four at once); forking
after the imports costs none. Nothing may compute with torch before the fork. Under torchrun the ranks exist already
and this module is not used. On several nodes one launcher a node runs this, and they meet in the run's store.
"""

from __future__ import annotations

import faulthandler
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from asyppo_megatron.launch.failure import Failure, RankFailed, Stopped, explain, find_failure
from asyppo_megatron.launch.hang import HangDetector, Watch
from asyppo_megatron.launch.peers import Peers, Place, open_store
from asyppo_megatron.launch.processes import EXIT_STOPPED, Child, end, fork_rank, reap

__all__ = ["EXIT_STOPPED", "Place", "RankFailed", "Stopped", "Watch", "is_launched", "run_ranks"]
_POLL_S = 1.0


def is_launched() -> bool:
    """Whether torchrun or srun started this process as one rank of a world."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def run_ranks(
    num_ranks: int,
    main: Callable[[int], None],
    log_dir: Path | None = None,
    *,
    place: Place | None = None,
    watch: Watch | None = None,
) -> None:
    """Fork this node's part of `num_ranks` ranks, which call `main(rank)`; return when all of the run are done.

    The launcher of node 0 hosts the rendezvous store, alone on a loopback port that the kernel chose, so no two
    runs collide. It starts after the last fork: its thread looks up the names of those who connect, and a rank
    forked at such a moment would inherit the C library's locked resolver and hang.

    Args:
        log_dir: what libraries write to a rank's stdout and stderr goes to `rank-<rank>.log` here, and tracebacks of
            all ranks; without it output stays where it was.
        place: of this node among those of the run; None: there is no other.
        watch: with it SIGTERM and SIGUSR1 ask the ranks to stop where they can be continued, and a rank that does not
            get on ends the run. Without it SIGTERM ends it at once.

    Raises:
        RankFailed: a rank ended with an error or a signal, or got stuck; all others have been ended too.
        KeyboardInterrupt: passed on after the ranks have been ended; `Stopped` where a signal asked for it.
    """
    place = place or Place()
    ranks = place.ranks(num_ranks)
    environment = {
        "MASTER_ADDR": place.host,
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # torch's name for: the store is hosted outside the ranks
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(len(ranks)),
    }
    ignored = [signal.SIGINT] if watch is None else [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    sys.stdout.flush()
    sys.stderr.flush()
    children: dict[int, Child] = {}
    with _Signals(is_graceful=watch is not None) as signals:
        try:
            for local_rank, rank in enumerate(ranks):
                own = environment | {"LOCAL_RANK": str(local_rank)}
                child = fork_rank(rank, own, main, log_dir, ignored)
                children[child.pid] = child
            store = open_store(place)
            peers = Peers(store, place)
            try:
                for child in children.values():
                    child.go(store.port)
                _Supervisor(children, peers, watch, signals, log_dir).run()
            finally:
                end(children)
                peers.close()
        finally:
            end(children)
            for child in children.values():
                child.close()


class _Signals:
    """SIGTERM and SIGUSR1 while ranks run: noted where they are answered gracefully, else raised as `Stopped`."""

    def __init__(self, *, is_graceful: bool):
        self._numbers = [signal.SIGTERM, signal.SIGUSR1] if is_graceful else [signal.SIGTERM]
        self._is_graceful = is_graceful
        self.received: int | None = None

    def __enter__(self) -> _Signals:
        self._previous = {number: signal.signal(number, self._handle) for number in self._numbers}
        if self._is_graceful:  # Slurm sends a signal to every process of a step
            faulthandler.register(signal.SIGUSR2, all_threads=True)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if not self._is_graceful:
            raise Stopped(number)
        self.received = self.received or number


class _Supervisor:
    """Waits for the ranks of this node; raises as soon as the run has failed, here or elsewhere."""

    def __init__(
        self,
        children: dict[int, Child],
        peers: Peers,
        watch: Watch | None,
        signals: _Signals,
        log_dir: Path | None,
    ):
        self._children, self._peers, self._watch, self._signals = children, peers, watch, signals
        self._where = f"; logs of all ranks: {log_dir}" if log_dir is not None else ""
        self._detector = HangDetector(watch, self._list, peers) if watch is not None else None
        self._give_up_at: float | None = None  # once a stop was asked for

    @property
    def _list(self) -> Sequence[Child]:
        return list(self._children.values())

    def run(self) -> None:
        while True:
            reap(self._children)
            self._check(find_failure(self._list, time.time()))
            self._check(self._peers.poll())
            running = any(child.code is None for child in self._list)
            if not running and self._peers.all_done:
                break
            if running and self._detector is not None:
                self._check(self._detector.poll())
            self._check_stop()
            self._wait()
        if any(child.code == EXIT_STOPPED for child in self._list):
            raise Stopped(self._signals.received or signal.SIGTERM, is_saved=True)

    def _check(self, failure: Failure | None) -> None:
        if failure is None:
            return
        # A moment for those of the same cause: a rank that was killed is the reason why its peers lost it.
        reap(self._children)
        own = [f for f in (failure, find_failure(self._list, time.time())) if f is not None]
        chosen = self._peers.first_failure([explain(own)])
        raise RankFailed(f"{chosen.message}{self._where}", chosen.traceback)

    def _check_stop(self) -> None:
        if self._watch is None:
            return
        if self._give_up_at is None and (self._signals.received is not None or self._peers.hears_stop()):
            self._give_up_at = time.monotonic() + self._watch.grace_s
            self._watch.board.request_stop()
            self._peers.announce_stop()
        if self._give_up_at is not None and time.monotonic() > self._give_up_at:
            raise Stopped(self._signals.received or signal.SIGTERM)

    def _wait(self) -> None:
        """Until a rank ends, a signal arrives, or a second has passed."""
        poll = select.poll()
        handles = [os.pidfd_open(child.pid) for child in self._list if child.code is None]
        try:
            for handle in handles:
                poll.register(handle, select.POLLIN)
            poll.poll(1000 * _POLL_S)
        finally:
            for handle in handles:
                os.close(handle)
