"""math-verify in killable worker processes.

sympy can hang, grow without bound or crash on a model's output, inside C code where no alarm reaches it. Each
call therefore runs in a process of its own with a memory limit, and is killed at a hard deadline.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

from asyppo_megatron.rewards.base import MAX_CHARACTERS, Status, Verdict

log = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
MAX_FAILED_STARTS = 3
MAX_REPLY_BYTES = 4096


@dataclass(eq=False)
class _Worker:
    """One process. `job` is the index of the pair it works on, due at `deadline` (monotonic seconds)."""

    process: subprocess.Popen[bytes]
    connection: Connection
    deadline: float
    ready: bool = False
    job: int | None = None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()


class MathVerifier:
    """Scores with math-verify; a call that hangs or crashes costs its worker and is scored 0 with its status."""

    def __init__(self, workers: int, timeout_s: float, memory_gb: float):
        """Args: worker processes, hard limit of one call in seconds, address space of a worker in GB."""
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError("reward.kind: got math, need the package math-verify; install it or choose exact")
        self._timeout_s, self._memory = timeout_s, int(memory_gb * 2**30)
        self._failed_starts = 0  # in a row
        self._workers = [self._start() for _ in range(workers)]

    def score_many(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Verdicts of (response text, reference answer) pairs, in their order; never raises for a response."""
        for slot, worker in enumerate(self._workers):
            if worker.job is not None:  # of a call that an error ended: its reply must not meet this one
                worker.kill()
                self._workers[slot] = self._start()
        todo = deque(range(len(pairs)))
        verdicts: list[Verdict | None] = [None] * len(pairs)
        while todo or any(w.job is not None for w in self._workers):
            for slot, worker in enumerate(self._workers):
                if not todo or not worker.ready or worker.job is not None:
                    continue
                if self._send(worker, todo[0], pairs[todo[0]]):
                    todo.popleft()
                else:  # it died between two calls, through no fault of this pair
                    worker.kill()
                    self._workers[slot] = self._start()
            self._collect(verdicts)
        return [v for v in verdicts if v is not None]

    def close(self) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def _start(self) -> _Worker:
        ours, theirs = socket.socketpair()
        arguments = [str(theirs.fileno()), str(os.getpid()), str(self._timeout_s), str(self._memory)]
        script = Path(__file__).with_name("math_worker.py")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        process = subprocess.Popen(
            # -P: this folder has a math.py, which must not stand in for the library's.
            [sys.executable, "-P", str(script), *arguments],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=environment,
        )
        theirs.close()
        return _Worker(process, Connection(ours.detach()), time.monotonic() + START_TIMEOUT_S)

    def _send(self, worker: _Worker, job: int, pair: tuple[str, str]) -> bool:
        text, answer = pair
        try:
            worker.connection.send_bytes(json.dumps([text[-MAX_CHARACTERS:], answer[:MAX_CHARACTERS]]).encode())
        except OSError:
            return False
        worker.job, worker.deadline = job, time.monotonic() + self._timeout_s
        return True

    def _collect(self, verdicts: list[Verdict | None]) -> None:
        """Wait for the next reply, death or deadline, and act on all there are."""
        busy = [w for w in self._workers if w.job is not None or not w.ready]
        if not busy:
            return
        patience = max(0.0, min(w.deadline for w in busy) - time.monotonic())
        answered = {id(c) for c in wait([w.connection for w in busy], patience)}
        now = time.monotonic()
        for slot, worker in enumerate(self._workers):
            if id(worker.connection) in answered:
                self._receive(slot, worker, verdicts)
            elif worker in busy and now >= worker.deadline:
                self._replace(slot, worker, verdicts, "verifier_timeout")

    def _receive(self, slot: int, worker: _Worker, verdicts: list[Verdict | None]) -> None:
        try:
            reply = json.loads(worker.connection.recv_bytes(MAX_REPLY_BYTES))
        except (EOFError, OSError, ValueError):
            self._replace(slot, worker, verdicts, "verifier_error")
            return
        if not worker.ready:
            worker.ready = True
            self._failed_starts = 0
        elif worker.job is not None:
            verdicts[worker.job] = Verdict(float(reply[0]), reply[1])
            worker.job = None

    def _replace(self, slot: int, worker: _Worker, verdicts: list[Verdict | None], status: Status) -> None:
        worker.kill()
        self._workers[slot] = self._start()
        if worker.job is not None:
            log.warning("math verifier: %s; worker %d killed and replaced", status, worker.process.pid)
            verdicts[worker.job] = Verdict(0.0, status)
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                raise RuntimeError(
                    f"math verifier: {self._failed_starts} workers in a row ended before they were ready (exit status "
                    f"{worker.process.returncode}); see their messages, or raise reward.memory_gb"
                )
