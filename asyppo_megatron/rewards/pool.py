"""Processes that may be killed: each takes one job at a time from a socket, under a hard deadline.

What a model wrote can hang a verifier, crash it or make it grow without bound, in C code where no alarm reaches it. So
no call runs in this process, and one that does not come back costs its process and is counted.
"""

from __future__ import annotations

import json
import logging
import math
import socket
import struct
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from asyppo_megatron.rewards.base import Status

log = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
MAX_FAILED_STARTS = 3


@dataclass(eq=False)
class Worker:
    """One process. `job` is the index of what it works on, due at `deadline` (monotonic seconds)."""

    process: subprocess.Popen[bytes]
    connection: Connection
    deadline: float
    ready: bool = False
    job: int | None = None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()


@dataclass(frozen=True)
class Failed:
    """In place of a reply: why there is none."""

    status: Status


class WorkerPool:
    """Processes of one kind.

    A process sends one JSON message when it is ready, then answers each JSON job with one JSON reply.

    Args:
        name: for messages.
        command: of the process in a slot, given the file descriptor of its socket.
        workers: processes.
        timeout_s: hard limit of one job.
        max_reply: bytes of a reply.
        environment: of the processes.
        advice: what to do when they do not start.
        directory: where they run; this process's by default.
    """

    def __init__(
        self,
        name: str,
        command: Callable[[int, int], list[str]],
        *,
        workers: int,
        timeout_s: float,
        max_reply: int,
        environment: Mapping[str, str],
        advice: str,
        directory: str | None = None,
    ):
        self._name, self._command, self._timeout_s, self._max_reply = name, command, timeout_s, max_reply
        self._environment, self._advice, self._directory = dict(environment), advice, directory
        self._failed_starts = 0  # in a row
        self.greeting: Any = None  # the ready message of the last process that sent one
        self.workers = [self._start(slot) for slot in range(workers)]

    def run(self, jobs: Sequence[Any]) -> list[Any]:
        """Replies in the order of the jobs, a `Failed` where one has none; never raises for a job."""
        encoded = [json.dumps(job).encode() for job in jobs]
        for slot, worker in enumerate(self.workers):
            if worker.job is not None:  # of a call that an error ended: its reply must not meet this one
                self._restart(slot)
        todo = deque(range(len(jobs)))
        replies: list[Any] = [None] * len(jobs)
        while todo or any(w.job is not None for w in self.workers):
            for slot, worker in enumerate(self.workers):
                if not todo or not worker.ready or worker.job is not None:
                    continue
                if self._send(worker, todo[0], encoded[todo[0]]):
                    todo.popleft()
                else:  # it died between two calls, through no fault of this job
                    self._restart(slot)
            self._collect(replies)
        return replies

    def wait_until_ready(self) -> Any:
        """The greeting of the first process that is ready; raises what `run` would when none starts."""
        while not any(w.ready for w in self.workers):
            self._collect([])
        return self.greeting

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
        self.workers = []

    def _start(self, slot: int) -> Worker:
        ours, theirs = socket.socketpair()
        process = subprocess.Popen(
            self._command(slot, theirs.fileno()),
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=self._environment,
            cwd=self._directory,
        )
        theirs.close()
        # A worker that does not read its job must not hold up this process: what is not taken in time is an OSError.
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", math.ceil(self._timeout_s), 0))
        return Worker(process, Connection(ours.detach()), time.monotonic() + START_TIMEOUT_S)

    def _restart(self, slot: int) -> None:
        self.workers[slot].kill()
        self.workers[slot] = self._start(slot)

    def _send(self, worker: Worker, job: int, message: bytes) -> bool:
        try:
            worker.connection.send_bytes(message)
        except OSError:
            return False
        worker.job, worker.deadline = job, time.monotonic() + self._timeout_s
        return True

    def _collect(self, replies: list[Any]) -> None:
        """Wait for the next reply, death or deadline, and act on all there are."""
        busy = [w for w in self.workers if w.job is not None or not w.ready]
        if not busy:
            return
        patience = max(0.0, min(w.deadline for w in busy) - time.monotonic())
        answered = {id(c) for c in wait([w.connection for w in busy], patience)}
        now = time.monotonic()
        for slot, worker in enumerate(self.workers):
            if id(worker.connection) in answered:
                self._receive(slot, worker, replies)
            elif worker in busy and now >= worker.deadline:
                self._replace(slot, worker, replies, "verifier_timeout")

    def _receive(self, slot: int, worker: Worker, replies: list[Any]) -> None:
        try:
            reply = json.loads(worker.connection.recv_bytes(self._max_reply))
        except (EOFError, OSError, ValueError, RecursionError):
            self._replace(slot, worker, replies, "verifier_error")
            return
        if not worker.ready:
            worker.ready, self.greeting = True, reply
            self._failed_starts = 0
        elif worker.job is not None:
            replies[worker.job] = reply
            worker.job = None

    def _replace(self, slot: int, worker: Worker, replies: list[Any], status: Status) -> None:
        self._restart(slot)
        if worker.job is not None:
            log.warning("%s: %s; worker %d killed and replaced", self._name, status, worker.process.pid)
            replies[worker.job] = Failed(status)
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                raise RuntimeError(
                    f"{self._name}: {self._failed_starts} workers in a row ended before they were ready (exit status "
                    f"{worker.process.returncode}); see their messages, or {self._advice}"
                )
