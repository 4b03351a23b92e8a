"""One process that calls a user's reward function; started by `FunctionReward` as a file, may be killed at any time."""

from __future__ import annotations

import asyncio
import ctypes
import importlib
import inspect
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve until the socket closes. Arguments: socket, parent, seconds a call, bytes of memory, path, pieces' name."""
    fd, parent, timeout_s, memory = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
    path, piece_name = sys.argv[5], sys.argv[6]
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.path.insert(0, os.getcwd())  # where `asyppo` was started: functions of the user's own project
    connection = Connection(fd)
    try:
        function = load(path)
    except Exception as e:  # whatever a module does at import, the run must hear of it
        connection.send_bytes(json.dumps(f"{type(e).__name__}: {e}").encode())
        return
    connection.send_bytes(b'"ready"')
    with asyncio.Runner() as runner:
        while True:
            try:
                job = json.loads(connection.recv_bytes())
            except EOFError:
                return
            connection.send_bytes(answer(runner, function, job, piece_name, timeout_s))


def load(path: str) -> Callable[..., Any]:
    """The function of "package.module:name"."""
    module, _, name = path.partition(":")
    function = getattr(importlib.import_module(module), name)
    if not callable(function):
        raise TypeError(f"{name} is {type(function).__name__}, need a function")
    return function


def answer(
    runner: asyncio.Runner, function: Callable[..., Any], job: dict[str, Any], piece_name: str, timeout_s: float
) -> bytes:
    """{"value": ...}, or {"error": ..., "status": ...} where the call failed."""
    pieces = job.pop("pieces")
    arguments = job | ({piece_name: pieces} if piece_name else {})
    try:
        value = function(**arguments)
        if inspect.isawaitable(value):
            value = runner.run(_await(value, timeout_s))
        return json.dumps({"value": plain(value)}, allow_nan=True).encode()
    except TimeoutError as e:
        return json.dumps({"error": f"TimeoutError: {e}"[:500], "status": "function_timeout"}).encode()
    except MemoryError:
        os._exit(1)  # what is left of the heap would fail the next call too; the parent replaces this process
    except Exception as e:  # a user's function can raise anything; it is counted
        return json.dumps({"error": f"{type(e).__name__}: {e}"[:500], "status": "function_error"}).encode()


async def _await(value: Any, timeout_s: float) -> Any:
    return await asyncio.wait_for(value, timeout_s * 0.9)  # before the parent's hard deadline


def plain(value: Any) -> Any:
    """Numbers of numpy and torch as Python's; what is no number or list of numbers as null."""
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return value if isinstance(value, int | float) else None


if __name__ == "__main__":
    main()
