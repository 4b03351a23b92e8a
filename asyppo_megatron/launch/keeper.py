"""Runs one command and sees to it that nothing of it is left: `python keeper.py GRACE_S COMMAND...`

An SGLang server is a tree of processes, some of which ignore SIGTERM or leave their parent. The keeper stands between
the server and whoever started it: when its stdin closes (its parent has ended, however), on SIGTERM or SIGINT,
or when the command itself has ended, it kills every descendant and returns only when the last one is gone. As their
"subreaper" (Linux) it inherits those whose parent ended. Standard library only: it starts in milliseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_KILL_S = 60.0  # for the kernel to take killed processes apart: those with much GPU memory need seconds


def main() -> int:
    """Keep the command of sys.argv; returns its exit code, 128 + n after a signal n."""
    grace_s, command = float(sys.argv[1]), sys.argv[2:]
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake)
    stop = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    for signum in (*stop, signal.SIGCHLD):
        signal.signal(signum, lambda *_: None)

    def prepare_child() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=prepare_child)
    code = None
    while code is None:
        ready, _, _ = select.select([0, woken], [], [])
        if 0 in ready and not os.read(0, 1 << 10):
            break
        if woken in ready and any(signum in stop for signum in os.read(woken, 1 << 10)):
            break
        code = _reap().get(child.pid)
    if code is None:
        child.send_signal(signal.SIGTERM)
        code = _wait_for(child.pid, grace_s)
    _kill_descendants()
    return code if code is not None else 128 + signal.SIGKILL


def _reap() -> dict[int, int]:
    """Exit codes of the children that have ended by now, by process id."""
    codes = {}
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            code = os.waitstatus_to_exitcode(status)
            codes[pid] = code if code >= 0 else 128 - code
    return codes


def _wait_for(pid: int, limit_s: float) -> int | None:
    """The exit code of a child, None when it has not ended in time."""
    deadline = time.monotonic() + limit_s
    while True:
        code = _reap().get(pid)
        if code is not None or time.monotonic() > deadline:
            return code
        time.sleep(0.02)


def descendants(root: int) -> list[int]:
    """Process ids below `root`, from /proc."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):  # it has just ended
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found, front = [], [root]
    while front:
        front = [child for pid in front for child in children.get(pid, [])]
        found += front
    return found


def _kill_descendants() -> None:
    """SIGKILL to all, again and again: one may fork while the list is read."""
    deadline = time.monotonic() + _KILL_S
    while time.monotonic() < deadline:
        _reap()
        left = descendants(os.getpid())
        if not left:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    print(f"keeper: processes that would not die: {left}", file=sys.stderr, flush=True)  # noqa: T201 its log


if __name__ == "__main__":
    sys.exit(main())
