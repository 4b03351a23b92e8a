"""One run of one SGLang server: its processes, its log, its port."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from asyppo_megatron.backend.scratch import ScratchDirectory
from asyppo_megatron.launch import keeper
from asyppo_megatron.launch.engine_command import EngineCommand

SGLANG_VERSION = "0.5.23"
STOP_GRACE_S = 3.0  # for a server to end on SIGTERM; it would wait for all its requests
_TAIL_LINES = 12
_TAIL_BYTES = 1 << 16


class EngineProcess:
    """A server and all its processes, which end with this process at the latest (`keeper`).

    Args:
        command: what to run.
        url: where it will listen.
        log: file for its output, appended to.
    """

    def __init__(self, command: EngineCommand, url: str, log: Path):
        self.url = url
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        # SGLang leaves its sockets and files in the temporary directory; this one goes with it. Its path is short:
        # a socket's has 107 bytes.
        self._scratch = ScratchDirectory(Path(tempfile.gettempdir()), "engine")
        environment = command.environment | {"TMPDIR": str(self._scratch.path)}
        self._log_start = log.stat().st_size if log.exists() else 0
        with log.open("ab") as out:
            self._keeper = subprocess.Popen(
                [sys.executable, "-I", keeper.__file__, str(STOP_GRACE_S), *command.argv],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # a Ctrl-C at the terminal is for whoever started us
            )

    @property
    def pids(self) -> list[int]:
        """The server's processes, the main one first; empty when it has ended."""
        return keeper.descendants(self._keeper.pid)

    def exit_code(self) -> int | None:
        """None while it runs; 128 + n when signal n ended it."""
        return self._keeper.poll()

    def request_stop(self) -> None:
        """Begin to end it; `close` waits for that."""
        if self._keeper.poll() is None:
            self._keeper.terminate()

    def close(self) -> None:
        """End it; returns when no process of it is left. May be called twice."""
        self.request_stop()
        self._keeper.wait()
        if self._keeper.stdin is not None:
            self._keeper.stdin.close()
        self._scratch.close()

    def log_tail(self) -> str:
        """The last lines of this run's output, warnings of libraries left out where errors follow."""
        with self.log.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(self._log_start, size - _TAIL_BYTES))
            lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        return "\n".join(line[:400] for line in lines[-_TAIL_LINES:])


def free_port(host: str) -> int:
    """A port that nobody listens on now. Should another process take it before the engine does, that is restarted."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def server_info(url: str, timeout_s: float) -> dict[str, Any]:
    """What the server says of itself. Its scheduler answers, so one that hangs does not; no token is generated, so a
    paused server and one that has released its memory do.

    Raises:
        OSError: no answer in time, or none that makes sense.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # engines are near: never through a proxy
    try:
        with opener.open(f"{url}/server_info", timeout=timeout_s) as answer:
            return json.load(answer)
    except ValueError as e:
        raise OSError(f"{url}/server_info: not JSON: {e}") from e


def version_error(url: str, info: dict[str, Any]) -> str:
    """Why a server cannot serve a run; "" when it can."""
    version = str(info.get("version", "unknown"))
    if version.partition("+")[0] == SGLANG_VERSION:
        return ""
    return (
        f"engine {url}: got SGLang {version}, need {SGLANG_VERSION}, whose protocol of weight updates "
        f"(begin_weight_update, end_weight_update) differs from other releases; install sglang=={SGLANG_VERSION}"
    )
