"""The trainer's side of the rollout driver: starting it, and calls with deadlines."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from asyppo_megatron.backend.scratch import ScratchDirectory, remove_abandoned
from asyppo_megatron.config import Config
from asyppo_megatron.rollout.server import driver_main
from asyppo_megatron.types import RunError

CONNECT_TIMEOUT_S = 60.0
START_TIMEOUT_S = 600.0
CALL_TIMEOUT_S = 3600.0  # the engines' own deadlines come first, and say more
ANSWER_TIMEOUT_S = 120.0  # for what the driver answers from memory
CLOSE_TIMEOUT_S = 10.0


class RolloutError(RunError):
    """The driver answered with an error, did not answer in time, or died."""


class DriverClient:
    """Calls of the driver's commands, one at a time. Every call ends: with an answer or a `RolloutError`.

    Attributes:
        needs_weights: at the last `wait` there were engines that had lost the current weights.
    """

    def __init__(
        self,
        socket_path: Path,
        log_path: Path | None = None,
        timeout_s: float = CONNECT_TIMEOUT_S,
        is_alive: Callable[[], bool] = lambda: True,
    ):
        """Connect, waiting up to `timeout_s` for the socket to appear while `is_alive` says the driver lives."""
        self._log = f"; see {log_path}" if log_path else ""
        self.needs_weights = False
        self._socket: socket.socket | None = None
        self._buffer = b""
        deadline = time.monotonic() + timeout_s
        while self._socket is None:
            attempt = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                attempt.connect(str(socket_path))
                self._socket = attempt
            except OSError as e:
                attempt.close()
                if time.monotonic() > deadline or not is_alive():
                    raise RolloutError(f"rollout driver: no connection to {socket_path}: {e}{self._log}") from e
                time.sleep(0.02)

    def hello(self, timeout_s: float = START_TIMEOUT_S) -> dict[str, Any]:
        """Wait until the driver has read its data and built its engine; what it found."""
        return self._call("hello", timeout_s)

    def restore(self, rollout_state: dict[str, Any]) -> None:
        self._call("restore", ANSWER_TIMEOUT_S, rollout_state=rollout_state)

    def load_weights(self, path: Path, policy_version: int, timeout_s: float = CALL_TIMEOUT_S) -> None:
        self._call("load_weights", timeout_s, path=str(path), policy_version=policy_version)

    def begin_update(self, policy_version: int, timeout_s: float = CALL_TIMEOUT_S) -> list[str]:
        """Tell the driver that the ranks bring weights to the engines; the engines' URLs."""
        return self._call("begin_update", timeout_s, policy_version=policy_version)["urls"]

    def end_update(self, policy_version: int, path: Path | None, timeout_s: float = CALL_TIMEOUT_S) -> None:
        self._call("end_update", timeout_s, policy_version=policy_version, path=str(path) if path else None)

    def start(self, step: int, policy_version: int) -> bool:
        """Begin a step's rollouts; whether they were taken from the journal."""
        return self._call("start", ANSWER_TIMEOUT_S, step=step, policy_version=policy_version)["replayed"]

    def wait(self, step: int, timeout_s: float) -> bool:
        """Whether the step is in the journal, after at most `timeout_s`; sets `needs_weights`.

        Raises:
            RolloutError: generation failed, or the driver died.
        """
        answer = self._call("wait", timeout_s + ANSWER_TIMEOUT_S, step=step, timeout_s=timeout_s)
        if "error" in answer:
            raise RolloutError(f"rollout driver: {answer['error']}{self._log}")
        self.needs_weights = answer.get("needs_weights", False)
        return answer["ready"]

    def evaluate(self, step: int, sets: list[str] | None = None, timeout_s: float = 3600.0) -> list[dict[str, Any]]:
        """Summaries of `EvalResult`, one a set, of the weights the engine holds."""
        return self._call("evaluate", timeout_s, step=step, sets=sets)["results"]

    def shutdown(self) -> None:
        """Ask the driver to end."""
        self._call("shutdown", CLOSE_TIMEOUT_S)
        self.close()

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _call(self, op: str, limit_s: float, **arguments: Any) -> dict[str, Any]:
        if self._socket is None:
            raise RolloutError(f"rollout driver: {op} after the connection was lost{self._log}")
        try:
            self._socket.settimeout(ANSWER_TIMEOUT_S)
            self._socket.sendall(json.dumps({"op": op, **arguments}).encode() + b"\n")
            line = self._read_line(time.monotonic() + limit_s)
        except TimeoutError as e:
            self.close()  # a late answer must not meet the next call
            raise RolloutError(f"rollout driver: no answer to {op} within {limit_s:.0f} s{self._log}") from e
        except OSError as e:
            self.close()
            raise RolloutError(f"rollout driver: died during {op} ({e}){self._log}") from e
        answer = json.loads(line)
        if not answer.pop("ok"):
            raise RolloutError(f"rollout driver: {answer['error']}{self._log}")
        return answer

    def _read_line(self, deadline: float) -> bytes:
        assert self._socket is not None
        while b"\n" not in self._buffer:
            patience = deadline - time.monotonic()
            if patience <= 0:
                raise TimeoutError
            self._socket.settimeout(patience)
            chunk = self._socket.recv(1 << 16)
            if not chunk:
                raise ConnectionResetError("connection closed")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line


@dataclass
class DriverHandle:
    """A driver process and the connection to it."""

    client: DriverClient
    process: BaseProcess
    scratch: ScratchDirectory

    @property
    def directory(self) -> Path:
        """Where its socket is."""
        return self.scratch.path

    def close(self) -> None:
        """End the driver, politely first."""
        try:
            self.client.shutdown()
        except RolloutError:
            self.client.close()
        self.process.join(CLOSE_TIMEOUT_S)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.scratch.close()


def start_driver(config: Config, run_dir: Path, start_method: str | None = None) -> DriverHandle:
    """Start the driver and connect to it; returns before it is ready (`client.hello` waits for that).

    Without a GPU it is forked, which saves the seconds of the imports: call this from the main thread of a process
    that has imported torch but not computed with it. CUDA does not survive a fork, so with a GPU it is spawned.

    Args:
        config: of the run.
        run_dir: for the journal, evaluations and logs.
        start_method: "fork" or "spawn" to have it one way.
    """
    method = start_method or ("spawn" if torch.cuda.is_available() else "fork")
    remove_abandoned()  # of runs that were killed
    scratch = ScratchDirectory(Path(tempfile.gettempdir()), "socket")  # short: a socket's path has 107 bytes
    socket_path = scratch.path / "driver"
    process = multiprocessing.get_context(method).Process(
        target=driver_main, args=(config, run_dir, socket_path, os.getpid()), name="rollout-driver", daemon=True
    )
    process.start()
    patience = START_TIMEOUT_S if method == "spawn" else CONNECT_TIMEOUT_S  # imports from a cold disk take minutes
    client = DriverClient(socket_path, run_dir / "logs" / "driver.log", patience, process.is_alive)
    return DriverHandle(client, process, scratch)
