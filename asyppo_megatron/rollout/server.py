"""The driver's process and socket: commands in, answers out.

It listens on a Unix socket: one JSON object a line in, `{"op": command, ...}`, one out, `{"ok": true, ...}` or
`{"ok": false, "error": ...}`.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import logging
import os
import signal
import socket
from pathlib import Path
from typing import Any

from asyppo_megatron.config import Config
from asyppo_megatron.rollout.driver import RolloutDriver, describe_error, limit_threads

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1
MAX_SOCKET_PATH = 107  # bytes; the kernel's limit for a Unix socket's address
MAX_COMMAND_BYTES = 1 << 20
COMMANDS = (
    "hello",
    "restore",
    "load_weights",
    "start",
    "wait",
    "evaluate",
    "begin_update",
    "end_update",
    "pause",
    "resume",
)


def serve(config: Config, run_dir: Path, socket_path: Path) -> None:
    """Answer commands until `shutdown`. What goes wrong while starting is told to the first who asks."""
    if len(os.fsencode(socket_path)) > MAX_SOCKET_PATH:
        raise ValueError(f"driver socket: got a path of {len(str(socket_path))} bytes, need <= {MAX_SOCKET_PATH}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(socket_path))
        listener.listen(8)
        driver: RolloutDriver | Exception
        try:
            driver = RolloutDriver(config, run_dir)
        except Exception as e:  # whatever it is, the trainer must hear of it
            log.exception("start failed")
            driver = e
        running = True
        while running:
            connection, _ = listener.accept()
            with connection:
                running = _serve_client(driver, connection)
        if isinstance(driver, RolloutDriver):
            driver.close()


def _serve_client(driver: RolloutDriver | Exception, connection: socket.socket) -> bool:
    """Answer one client until it hangs up; whether to wait for another."""
    try:
        with connection.makefile("rb") as lines:
            while line := lines.readline(MAX_COMMAND_BYTES):
                answer, stop = _answer(driver, line)
                connection.sendall(json.dumps(answer).encode() + b"\n")
                if stop:
                    return False
    except OSError as e:
        log.warning("client lost: %s", e)
    return True


def _answer(driver: RolloutDriver | Exception, line: bytes) -> tuple[dict[str, Any], bool]:
    """The answer to a command, and whether the driver ends with it."""
    try:
        command = json.loads(line)
        name = command.pop("op")
        if isinstance(driver, Exception):
            return {"ok": False, "error": f"did not start: {describe_error(driver)}"}, True
        if name == "shutdown":
            return {"ok": True}, True
        if name not in COMMANDS:
            raise ValueError(f"driver: got command {name!r}, need one of {', '.join(COMMANDS)}, shutdown")
        return {"ok": True, **getattr(driver, name)(**command)}, False
    except Exception as e:  # an answer for every command: the trainer decides what ends the run
        log.exception("command failed: %s", line[:200])
        return {"ok": False, "error": describe_error(e)}, False


def driver_main(config: Config, run_dir: Path, socket_path: Path, parent: int) -> None:
    """Entry of the driver process: dies with its parent, logs to its own file, leaves Ctrl-C to the parent."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    # Its trainer ends it. Slurm signals every process of a job, and this one's workers inherit what it ignores.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    path = run_dir / "logs" / "driver.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    faulthandler.enable(open(2, "w", closefd=False))  # noqa: SIM115 - lives as long as the process
    logging.basicConfig(
        level=config.logging.level,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        handlers=[logging.FileHandler(path)],
        force=True,
    )
    limit_threads()
    code = 1
    try:
        serve(config, run_dir, socket_path)
        code = 0
    except Exception:
        log.exception("driver ended")
    logging.shutdown()
    os._exit(code)  # a generation under way is not worth waiting for
