"""Agents as processes, and what is left of them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from engine_servers import START_S, engine_environment

from asyppo_megatron.launch.keeper import descendants
from asyppo_megatron.rollout.agents import AgentClient, AgentError, address_path, read_address

GONE_S = 60.0


@dataclass
class AgentProcess:
    """`asyppo serve` as a child of the test."""

    client: AgentClient
    process: subprocess.Popen
    address_file: Path
    seen: set[int]  # every process of it that was ever looked at

    def engine(self) -> dict[str, Any]:
        """The row of its only engine."""
        (row,) = self.client.engines()
        self.seen.update(row["pids"], descendants(self.process.pid))
        return row

    def wait_for(self, condition: Callable[[dict[str, Any]], bool], limit_s: float = START_S) -> dict[str, Any]:
        """The engine's row once it fulfils the condition."""
        return wait_until(self.engine, condition, limit_s)

    def signal(self, signum: int) -> int:
        """End the agent by a signal; returns its exit code."""
        self.seen.update(descendants(self.process.pid), [self.process.pid])
        self.process.send_signal(signum)
        return self.process.wait(GONE_S)


def start_agent(config: Path) -> AgentProcess:
    """Start `asyppo serve` with the configuration of a run (`write_run`); returns when it answers."""
    path, said = address_path(config.with_suffix("")), config.with_suffix(".agent.log")
    command = [sys.executable, "-m", "asyppo_megatron", "serve", str(config)]
    with said.open("ab") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=engine_environment())

    def client() -> AgentClient | None:
        assert process.poll() is None, said.read_text()
        try:
            found = AgentClient(read_address(path).url)
            found.health()
            return found
        except AgentError:
            return None

    return AgentProcess(wait_until(client, bool, START_S), process, path, {process.pid})


def start_owner(config: Path) -> tuple[subprocess.Popen, dict[str, Any]]:
    """A run that holds an agent; returns it and what the agent says of itself."""
    command = [sys.executable, str(Path(__file__).parent / "agent_owner.py"), str(config)]
    said = config.with_suffix(".owner.log")
    with said.open("ab") as log:
        owner = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=engine_environment(), text=True
        )
    assert owner.stdout is not None
    line = owner.stdout.readline()
    assert line, said.read_text()
    return owner, json.loads(line)


def wait_until(look: Callable[[], Any], condition: Callable[[Any], bool], limit_s: float) -> Any:
    """What `look` returns once it fulfils the condition."""
    deadline = time.monotonic() + limit_s
    while True:
        found = look()
        if condition(found):
            return found
        assert time.monotonic() < deadline, f"not within {limit_s} s; last: {found}"
        time.sleep(0.3)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent to look does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def assert_gone(pids: Iterable[int], *urls: str) -> None:
    """No process is left, soon, and nobody listens any more."""
    pids = set(pids)
    assert pids
    wait_until(lambda: [pid for pid in pids if is_alive(pid)], lambda left: not left, GONE_S)
    for url in filter(None, urls):
        parts = urlsplit(url)
        with socket.socket() as probe:
            assert probe.connect_ex((parts.hostname, parts.port)) != 0, f"{url} is still open"


def end(process: subprocess.Popen) -> None:
    """Make sure of it, after a test that failed; an agent's engines end with it."""
    if process.poll() is None:
        os.kill(process.pid, signal.SIGTERM)
        try:
            process.wait(GONE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
