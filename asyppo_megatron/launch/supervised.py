"""One engine under supervision: started, asked after its health, ended when it hangs, started again, given up.

starting -> ready -> dead (waits for its back-off) -> starting -> ...     failed: given up, the reason says why
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from asyppo_megatron.config import SGLangConfig
from asyppo_megatron.launch.engine_command import EngineCommand
from asyppo_megatron.launch.engine_process import EngineProcess, free_port, server_info, version_error

logger = logging.getLogger(__name__)

State = Literal["starting", "ready", "dead", "failed"]
_START_PROBE_S = 0.5  # between two questions to a server that is starting: it refuses the connection at once


@dataclass(frozen=True)
class EngineStatus:
    """What an agent says of an engine; a row of `GET /engines`.

    Attributes:
        url: where it listens; another one after each start. "" while there is no process.
        incarnation: grows with every start, over agents too: answers and weights of another one do not count.
        pids: its processes, the main one first.
        restarts: within `restart_window_s`.
        reason: why it is not ready, or was not the last time.
    """

    id: str
    url: str
    state: State
    tp: int
    gpus: tuple[int, ...]
    incarnation: int
    pids: tuple[int, ...]
    restarts: int
    log: str
    reason: str

    def to_json(self) -> dict[str, object]:
        return asdict(self)


class SupervisedEngine:
    """Drives one engine; `tick` is called by one thread, `status` and `request_restart` by any.

    Args:
        name: its id.
        settings: deadlines and limits.
        make_command: port -> how to start it.
        log: file for its output, of all its starts.
        executor: runs the questions after its health, each bounded by `health_timeout_s`.
    """

    def __init__(
        self,
        name: str,
        settings: SGLangConfig,
        make_command: Callable[[int], EngineCommand],
        log: Path,
        executor: Executor,
    ):
        self.name = name
        self._settings = settings
        self._make_command = make_command
        self._log = log
        self._executor = executor
        self._lock = threading.Lock()  # guards what `status` reads
        self._process: EngineProcess | None = None
        self._gpus: tuple[int, ...] = ()
        self._state: State = "dead"
        self._reason = ""
        self._incarnation = 0
        self._starts: deque[float] = deque()  # of restarts, monotonic seconds
        self._start_at = 0.0  # when dead: not before
        self._started = 0.0
        self._last_answer = 0.0
        self._probe: Future[dict] | None = None
        self._next_probe = 0.0
        self._restart_requested = False

    def status(self) -> EngineStatus:
        with self._lock:
            process = self._process
            return EngineStatus(
                self.name,
                process.url if process is not None else "",
                self._state,
                self._settings.tp,
                self._gpus,
                self._incarnation,
                tuple(process.pids) if process is not None else (),
                len(self._starts),
                str(self._log),
                self._reason,
            )

    def request_restart(self) -> None:
        """Have it ended and started again at once, also when it was given up."""
        self._restart_requested = True

    def tick(self) -> None:
        """Do what is due now; never blocks for longer than ending a process takes."""
        now = time.monotonic()
        if self._restart_requested:
            self._restart_requested = False
            self._starts.clear()
            self._end("dead", "restart requested")
            self._start_at = now
        if self._state == "dead" and now >= self._start_at:
            self._start()
        if self._process is None:
            return
        code = self._process.exit_code()
        if code is not None:
            self._died(f"ended with {_exit_text(code)} after {now - self._started:.0f} s")
            return
        self._watch_health(now)

    def close(self) -> None:
        """End its processes."""
        self._end("dead", "the agent has ended")

    def begin_close(self) -> None:
        """Ask its processes to end; `close` waits for them."""
        if self._process is not None:
            self._process.request_stop()

    def _start(self) -> None:
        port = free_port(self._settings.host)
        command = self._make_command(port)
        process = EngineProcess(command, f"http://{reachable(self._settings.host)}:{port}", self._log)
        now = time.monotonic()
        with self._lock:
            self._process, self._gpus, self._state = process, command.gpus, "starting"
            self._incarnation = max(self._incarnation + 1, int(time.time()))
        self._started = self._last_answer = self._next_probe = now
        self._probe = None
        logger.info("engine %s: starting at %s, log %s", self.name, process.url, self._log)

    def _watch_health(self, now: float) -> None:
        assert self._process is not None
        if self._probe is None and now >= self._next_probe:
            self._probe = self._executor.submit(server_info, self._process.url, self._settings.health_timeout_s)
        elif self._probe is not None and self._probe.done():
            error = self._probe.exception()
            if error is None:
                self._answered(self._probe.result(), now)
            elif not isinstance(error, OSError):
                raise error
            self._probe = None
            period = self._settings.health_interval_s if self._state == "ready" else _START_PROBE_S
            self._next_probe = now + period
        if self._process is None:  # its version was refused
            return
        if self._state == "starting" and now - self._started > self._settings.start_timeout_s:
            self._died(f"not ready within start_timeout_s = {self._settings.start_timeout_s:g} s")
        silent_s = now - self._last_answer
        limit_s = self._settings.health_timeout_s + self._settings.health_interval_s
        if self._state == "ready" and silent_s > limit_s:
            self._died(f"hung: no answer for {silent_s:.0f} s (health_timeout_s {self._settings.health_timeout_s:g})")

    def _answered(self, info: dict, now: float) -> None:
        assert self._process is not None
        self._last_answer = now
        if self._state == "ready":
            return
        refusal = version_error(self._process.url, info)
        if refusal:
            self._end("failed", refusal)
            logger.error("engine %s: %s", self.name, refusal)
            return
        with self._lock:
            self._state = "ready"
        logger.info("engine %s: ready at %s after %.0f s", self.name, self._process.url, now - self._started)

    def _died(self, what: str) -> None:
        """Restart later, or give up."""
        assert self._process is not None
        now = time.monotonic()
        while self._starts and now - self._starts[0] > self._settings.restart_window_s:
            self._starts.popleft()
        tail = self._process.log_tail()
        if len(self._starts) >= self._settings.max_restarts:
            reason = (
                f"{what}; given up after {len(self._starts)} restart(s) within {self._settings.restart_window_s:g} s "
                f"(rollout.sglang.max_restarts); log {self._log}, its end:\n{tail}"
            )
            self._end("failed", reason)
            logger.error("engine %s: %s", self.name, reason)
            return
        backoff_s = self._settings.restart_backoff_s * 2 ** len(self._starts)
        self._starts.append(now)
        self._end("dead", what)
        self._start_at = now + backoff_s
        logger.warning("engine %s: %s; restarting in %.0f s; log %s", self.name, what, backoff_s, self._log)

    def _end(self, state: State, reason: str) -> None:
        process = self._process
        with self._lock:
            self._state, self._reason, self._process, self._probe = state, reason, None, None
        if process is not None:
            process.close()


def _exit_text(code: int) -> str:
    return f"signal {code - 128}" if code > 128 else f"exit code {code}"


def reachable(host: str) -> str:
    """The name that others reach a listening address by."""
    if host in ("0.0.0.0", "::"):
        return socket.getfqdn()
    return f"[{host}]" if ":" in host else host
