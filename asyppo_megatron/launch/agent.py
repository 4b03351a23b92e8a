"""The node agent: `asyppo serve` supervises the SGLang servers of one node and says where they are.

    GET  /engines               {"engines": [EngineStatus, ...]}
    POST /engines/{id}/restart  end it, start it again, also one that was given up
    GET  /health                {"node", "pid", "fingerprint", "sglang"}
    GET  /lease                 stays open: a run that holds one lives
    POST /shutdown              end all engines and the agent

Whoever reaches these ports can stop engines, and SGLang itself executes what it is sent as weights: loopback, or a
closed network.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from asyppo_megatron.config import Config
from asyppo_megatron.launch.engine_command import engine_command, missing_for_engines
from asyppo_megatron.launch.engine_process import SGLANG_VERSION
from asyppo_megatron.launch.supervised import SupervisedEngine, reachable
from asyppo_megatron.rollout.agents import AgentAddress, AgentError, address_path, node_name, read_address

logger = logging.getLogger(__name__)

_TICK_S = 0.2
_REQUEST_TIMEOUT_S = 20.0
_FIRST_LEASE_S = 120.0  # for the run that starts an agent to find it


def fingerprint(config: Config, num_gpus: int) -> str:
    """Hash of all that decides how engines are started but for their ports."""
    commands = [
        (command.argv, command.gpus)
        for index in range(config.rollout.sglang.num_engines)
        for command in [engine_command(config, index, 0, num_gpus)]
    ]
    return hashlib.sha256(repr(commands).encode()).hexdigest()[:16]


class Agent:
    """The engines of this node and the server that tells about them.

    Args:
        config: of the run; `rollout.sglang` says how many engines, of which kind.
        num_gpus: GPUs that this process sees; 0: a CPU machine.
        linger_s: end when no run has held a lease for so long; None: live until told otherwise.

    Raises:
        ValueError: engines cannot be started here; the message says what is missing.
    """

    def __init__(self, config: Config, num_gpus: int, linger_s: float | None = None):
        missing = missing_for_engines(num_gpus)
        if missing:
            raise ValueError(missing)
        settings = config.rollout.sglang
        self._fingerprint = fingerprint(config, num_gpus)
        self._linger_s = linger_s
        self._leases = 0
        self._unleased_since = time.monotonic() + _FIRST_LEASE_S
        self._lock = threading.Lock()  # guards the two above
        self.why_stopped = ""  # a plain flag: an Event's lock could be held when a signal arrives
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        server_class = type("_Server", (_Server,), {"address_family": family})
        self._server = server_class((settings.host, settings.port), self)
        port = self._server.server_address[1]
        self.address = AgentAddress(
            f"http://{reachable(settings.host)}:{port}", node_name(), os.getpid(), self._fingerprint
        )
        self._executor = ThreadPoolExecutor(2 * settings.num_engines, thread_name_prefix="health")
        self.engines = {
            name: SupervisedEngine(
                name,
                settings,
                lambda engine_port, index=index: engine_command(config, index, engine_port, num_gpus),
                config.run_dir / "logs" / f"engine-{name}.log",
                self._executor,
            )
            for index in range(settings.num_engines)
            for name in [f"{node_name()}-{port}-{index}"]
        }

    def run(self, path: Path) -> None:
        """Supervise until SIGTERM, SIGINT, a request to stop, or the end of the last lease; then leave nothing behind.

        Args:
            path: file for the address, removed at the end.
        """
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(signum, lambda number, frame: self.stop(signal.Signals(number).name))
        serving = threading.Thread(target=self._server.serve_forever, name="http", daemon=True)
        serving.start()
        try:
            self.address.write(path)
            logger.info("agent: %s, address in %s", self.address.url, path)
            while not self.why_stopped:
                for engine in self.engines.values():
                    engine.tick()
                self._look_at_leases()
                time.sleep(_TICK_S)
        finally:
            self._close(path)

    def stop(self, why: str) -> None:
        """End soon; safe from any thread and from a signal handler."""
        self.why_stopped = self.why_stopped or why

    def describe(self) -> dict[str, object]:
        return {
            "node": self.address.node,
            "pid": self.address.pid,
            "fingerprint": self._fingerprint,
            "sglang": SGLANG_VERSION,
        }

    @contextlib.contextmanager
    def lease(self) -> Iterator[None]:
        """While it is held the run lives."""
        with self._lock:
            self._leases += 1
        try:
            yield
        finally:
            with self._lock:
                self._leases -= 1
                self._unleased_since = time.monotonic()

    def _look_at_leases(self) -> None:
        with self._lock:
            alone_s = 0.0 if self._leases else time.monotonic() - self._unleased_since
        if self._linger_s is not None and alone_s > self._linger_s:
            self.stop(f"no run for {alone_s:.0f} s (rollout.sglang.linger_s)")

    def _close(self, path: Path) -> None:
        logger.info("agent: ending (%s)", self.why_stopped or "an error")
        with contextlib.suppress(AgentError):  # the run's directory may have been removed
            if read_address(path) == self.address:  # else a later agent has taken the place
                path.unlink(missing_ok=True)
        for engine in self.engines.values():
            engine.begin_close()
        for engine in self.engines.values():
            engine.close()
        self._server.shutdown()
        self._server.server_close()
        self._executor.shutdown(wait=False, cancel_futures=True)


class _Server(ThreadingHTTPServer):
    """One thread a request, none of which keeps the process."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], agent: Agent):
        super().__init__(address, _Handler)
        self.agent = agent


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _REQUEST_TIMEOUT_S  # for a client that sends half a request

    def do_GET(self) -> None:
        agent = self.server.agent
        if self.path == "/health":
            self._answer(200, agent.describe())
        elif self.path == "/engines":
            self._answer(200, {"engines": [engine.status().to_json() for engine in agent.engines.values()]})
        elif self.path == "/lease":
            self._hold_lease()
        else:
            self._answer(404, {"error": f"{self.path}: unknown; known are /engines, /health, /lease"})

    def do_POST(self) -> None:
        agent, parts = self.server.agent, self.path.strip("/").split("/")
        if self.path == "/shutdown":
            self._answer(200, {})
            agent.stop("asked to over HTTP")
        elif len(parts) == 3 and parts[0] == "engines" and parts[2] == "restart":
            if parts[1] not in agent.engines:
                self._answer(404, {"error": f"engine {parts[1]!r}: unknown, have {sorted(agent.engines)}"})
                return
            agent.engines[parts[1]].request_restart()
            self._answer(200, {})
        else:
            self._answer(404, {"error": f"{self.path}: unknown; known are /engines/ID/restart, /shutdown"})

    def _hold_lease(self) -> None:
        """Until the client's end of the connection is closed, by the client or its kernel."""
        self.send_response(200)
        self.end_headers()
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        with self.server.agent.lease():
            while True:
                select.select([self.connection], [], [])
                try:
                    if not self.connection.recv(1 << 10):
                        return
                except OSError:
                    return

    def _answer(self, status: int, body: dict[str, object]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        logger.debug(format, *args)


def serve(config: Config, num_gpus: int, path: Path | None = None, linger_s: float | None = None) -> str:
    """Run the agent of this node until it is told to end; returns why it ended."""
    agent = Agent(config, num_gpus, linger_s)
    agent.run(path or address_path(config.run_dir))
    return agent.why_stopped
