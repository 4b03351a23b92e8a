"""Node agents seen from outside: where they are, what they say of their engines."""

from __future__ import annotations

import http.client
import json
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from asyppo_megatron.config import Config

DIRECTORY = "agents"  # of a run, one file an agent
ANSWER_TIMEOUT_S = 20.0


class AgentError(RuntimeError):
    """An agent cannot be reached or refuses; the message says which and what to do."""


@dataclass(frozen=True)
class AgentAddress:
    """What an agent leaves behind for those who look for it.

    Attributes:
        url: `http://host:port`.
        node: the machine it runs on.
        pid: of its process there.
        fingerprint: of the configuration of its engines; another one starts them differently.
    """

    url: str
    node: str
    pid: int
    fingerprint: str

    def write(self, path: Path) -> None:
        """Atomically: a reader finds all of it or nothing."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps(asdict(self)) + "\n")
        os.replace(partial, path)


def read_address(path: Path) -> AgentAddress:
    """Raises AgentError: there is none, or it is damaged."""
    try:
        return AgentAddress(**json.loads(path.read_text()))
    except OSError as e:
        raise AgentError(f"{path}: no agent's address: {e.strerror}; start `asyppo serve` first") from e
    except (ValueError, TypeError) as e:
        raise AgentError(f"{path}: not an agent's address ({e}); start `asyppo serve` again") from e


def node_name() -> str:
    """This machine; a Slurm node by Slurm's name, since virtual nodes share a host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def address_path(run_dir: Path, node: str | None = None) -> Path:
    """Where the agent of a node leaves its address."""
    return run_dir / DIRECTORY / f"{node or node_name()}.json"


def agent_urls(config: Config) -> list[str]:
    """The agents of a run: those that are configured, else those that left their address in the run's directory.

    An item of `rollout.sglang.agents` is a URL, a file that holds an address, or a directory of such files.

    Raises:
        AgentError: a configured file is not there, or damaged.
    """
    urls: list[str] = []
    for agent in config.rollout.sglang.agents or (str(config.run_dir / DIRECTORY),):
        path = Path(agent)
        if "://" in agent:
            urls.append(agent.rstrip("/"))
        elif path.is_dir() or agent not in config.rollout.sglang.agents:
            urls += [read_address(file).url for file in sorted(path.glob("*.json"))]
        else:
            urls.append(read_address(path).url)
    return urls


class AgentClient:
    """Questions to one agent; each with a deadline, none cached."""

    def __init__(self, url: str, timeout_s: float = ANSWER_TIMEOUT_S):
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        parts = urlsplit(self.url)
        self._host, self._port = parts.hostname or "", parts.port or 80

    def health(self) -> dict[str, Any]:
        """`{"node", "pid", "fingerprint", "sglang"}`."""
        return self._call("GET", "/health")

    def engines(self) -> list[dict[str, Any]]:
        """Rows of `GET /engines` (launch/supervised.EngineStatus)."""
        return self._call("GET", "/engines")["engines"]

    def restart(self, engine_id: str) -> None:
        """Have one engine ended and started again, also one that was given up."""
        self._call("POST", f"/engines/{engine_id}/restart")

    def shutdown(self) -> None:
        """Have the agent end its engines and itself; returns when it has begun."""
        self._call("POST", "/shutdown")

    def lease(self) -> socket.socket:
        """A connection that tells the agent that its run lives. It ends with this process, however that ends."""
        try:
            lease = socket.create_connection((self._host, self._port), self._timeout_s)
            lease.sendall(b"GET /lease HTTP/1.0\r\n\r\n")
            answer = lease.recv(1 << 12)
        except OSError as e:
            raise self._unreachable("/lease", e) from e
        if answer.split()[1:2] != [b"200"]:
            lease.close()
            raise AgentError(f"agent {self.url}/lease: answered {answer[:100]!r}, need 200; is this an agent?")
        lease.settimeout(None)
        lease.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return lease

    def _connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_s)

    def _unreachable(self, path: str, error: Exception) -> AgentError:
        return AgentError(f"agent {self.url}{path}: no answer ({error}); is it running? start `asyppo serve` again")

    def _call(self, method: str, path: str) -> dict[str, Any]:
        connection = self._connect()
        try:
            connection.request(method, path)
            answer = connection.getresponse()
            body = json.loads(answer.read())
        except (OSError, http.client.HTTPException, ValueError) as e:
            raise self._unreachable(path, e) from e
        finally:
            connection.close()
        if answer.status != 200:
            raise AgentError(f"agent {self.url}{path}: answered {answer.status}: {body.get('error', body)}")
        return body
