"""The agent that a run starts for itself, or takes up again from its last start.

It is a process of its own session. While the run lives it holds a lease; a run that finishes ends it. After a crash
the agent and its engines live on for `rollout.sglang.linger_s`, and the next start of the same run takes them up,
which saves the minutes in which large engines load. Then they end: nothing is left behind for good.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asyppo_megatron.config import Config, dump_config
from asyppo_megatron.launch.agent import fingerprint
from asyppo_megatron.launch.engine_command import missing_for_engines
from asyppo_megatron.rollout.agents import AgentClient, AgentError, address_path, node_name, read_address

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 300.0  # of the agent alone, without its engines: imports from a cold disk, on a busy machine
_STOP_TIMEOUT_S = 120.0
_POLL_S = 0.1


class RunAgent:
    """The lease on an agent. client: to talk to it."""

    def __init__(self, client: AgentClient, address_file: Path, linger_s: float):
        self.client = client
        self._file = address_file
        self._linger_s = linger_s
        self._lease: socket.socket | None = client.lease()

    def close(self, finished: bool) -> None:
        """Give the lease back; the agent of a finished run ends, and this returns when it and its engines have."""
        if self._lease is None:
            return
        if finished:
            _shut_down(self.client, self._file)
        else:
            what = "agent %s: its engines wait %g s for the next start of this run (rollout.sglang.linger_s)"
            logger.warning(what, self.client.url, self._linger_s)
        self._lease.close()
        self._lease = None


def needs_own_agent(config: Config) -> bool:
    """Whether the run generates with SGLang and nobody else provides engines."""
    engines = config.rollout.sglang
    return config.rollout.engine == "sglang" and not engines.urls and not engines.agents


def ensure_agent(config: Config, num_gpus: int) -> RunAgent:
    """The agent of this node for this run: the living one that fits its configuration, else a new one.

    Args:
        num_gpus: GPUs that this process sees; 0: a CPU machine.

    Raises:
        ValueError: engines cannot be started here.
        AgentError: the agent did not start; the message names its log.
    """
    missing = missing_for_engines(num_gpus)
    if missing:
        raise ValueError(missing)
    path = address_path(config.run_dir)
    living = _living(path)
    if living is not None:
        found = living.health()["fingerprint"]
        if found == fingerprint(config, num_gpus):
            agent = RunAgent(living, path, config.rollout.sglang.linger_s)
            logger.info("agent %s: taken up with its engines", living.url)
            if config.rollout.sglang.placement == "colocated":
                _start_again(living, config.rollout.sglang.start_timeout_s)
            return agent
        logger.info("agent %s: its engines were configured otherwise; replacing it", living.url)
        _shut_down(living, path)
    agent = RunAgent(_start(config, path), path, config.rollout.sglang.linger_s)
    if config.rollout.sglang.placement == "colocated":
        wait_for_engines(agent.client, config.rollout.sglang.start_timeout_s)  # they measure what memory is free
    return agent


def wait_for_engines(client: AgentClient, limit_s: float, later_than: Mapping[str, int] | None = None) -> None:
    """Return when all engines of an agent are ready.

    Args:
        later_than: by engine, an incarnation that does not count.

    Raises:
        AgentError: one was given up, or is not ready in time.
    """
    deadline = time.monotonic() + limit_s
    before = later_than or {}
    while True:
        rows = [row for row in client.engines() if row["state"] != "ready" or not _is_new(row, before)]
        if not rows:
            return
        for row in rows:
            if row["state"] == "failed" and _is_new(row, before):
                raise AgentError(f"engine {row['id']}: {row['reason']}")
        if time.monotonic() > deadline:
            row = rows[0]
            raise AgentError(
                f"engine {row['id']}: still {row['state']} after {limit_s:.0f} s (rollout.sglang.start_timeout_s); "
                f"log {row['log']}"
            )
        time.sleep(0.5)


def _is_new(row: dict[str, Any], before: Mapping[str, int]) -> bool:
    return row["incarnation"] > before.get(row["id"], 0)


def _start_again(client: AgentClient, limit_s: float) -> None:
    """Fresh engines: a crashed run's may be without their memory, and resuming what was not released kills a server."""
    before = {row["id"]: row["incarnation"] for row in client.engines()}
    for name in before:
        client.restart(name)
    wait_for_engines(client, limit_s, before)


def _living(path: Path) -> AgentClient | None:
    """The agent that left this address, if it still answers."""
    try:
        address = read_address(path)
        client = AgentClient(address.url)
        health = client.health()
    except AgentError:
        return None
    return client if health.get("pid") == address.pid and health.get("node") == address.node else None


def _start(config: Config, path: Path) -> AgentClient:
    """A new agent process, in a session of its own so that a signal to the run's does not reach it."""
    directory = config.run_dir.resolve()
    settings = directory / "agents" / f"{node_name()}.yaml"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(dump_config(config))
    log = directory / "logs" / f"agent-{node_name()}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "asyppo_megatron", "serve", str(settings)]
    command += ["--address-file", str(path.resolve()), "--linger", str(config.rollout.sglang.linger_s)]
    # It holds no descriptor of ours: a terminal or a pipe that waits for our end must not wait for the agent's.
    with log.open("ab") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, env=_environment()
        )
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        client = _living(path)
        if client is not None:
            logger.info("agent %s: started, log %s", client.url, log)
            return client
        if process.poll() is not None:
            raise AgentError(f"agent: ended with exit code {process.returncode} at start; log {log}:\n{_tail(log)}")
        time.sleep(_POLL_S)
    process.kill()
    process.wait()
    raise AgentError(f"agent: not ready within {START_TIMEOUT_S:.0f} s; log {log}")


def _environment() -> dict[str, str]:
    """Ours, with the directory that this package is imported from: the agent may start from another one."""
    root = str(Path(__file__).resolve().parents[2])
    return dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")])))


def _shut_down(client: AgentClient, path: Path) -> None:
    """Ask an agent to end and wait until it has: its port is closed last."""
    try:
        client.shutdown()
    except AgentError:
        return  # it is gone already
    deadline = time.monotonic() + _STOP_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            client.health()
        except AgentError:
            path.unlink(missing_ok=True)
            return
        time.sleep(_POLL_S)
    raise AgentError(f"agent {client.url}: still there {_STOP_TIMEOUT_S:.0f} s after it was asked to end")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-10:])
