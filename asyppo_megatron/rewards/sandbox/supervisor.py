"""A process that takes programs from a socket and runs each in a jail of its own.

Started by the pool as `python -I -S -c "..." fd parent uid python allow_unprotected`; it holds no secrets of the parent
but its address space, which a jail cannot see. It may be killed at any time: the kernel then ends the jail with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from typing import Any

from . import jail, kernel
from .tests_runner import serve_one

GRACE_S = 5.0  # beyond a job's own limit, for building and ending its jail
PROBE_LIMITS = {
    "memory": 1 << 30,
    "processes": 8,
    "file_bytes": 1 << 20,
    "open_files": 32,
    "output_bytes": 4096,
    "test_s": 20.0,
    "total_s": 20.0,
}
PROBE = {
    "program": "print(input())",
    "tests": [{"stdin": "ok", "stdout": "ok"}],
    "stop_at_failure": True,
    "limits": PROBE_LIMITS,
}


def main() -> None:
    """Serve until the socket closes."""
    fd, parent, uid = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    python, allowed = sys.argv[4], sys.argv[5] == "1"
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    connection = Connection(fd)
    supervisor = Supervisor(uid, python)
    try:
        failures = supervisor.choose_mode(allowed)
        if supervisor.mode is None:
            connection.send_bytes(json.dumps({"refused": failures}).encode())
            return
        connection.send_bytes(json.dumps({"mode": supervisor.mode, "why": failures}).encode())
        while True:
            try:
                job = json.loads(connection.recv_bytes())
            except EOFError:
                return
            connection.send_bytes(json.dumps(supervisor.run(job)).encode())
    finally:
        supervisor.close()


class Supervisor:
    """Runs jobs in the strongest jail that this machine allows.

    Args:
        uid: of programs where this process is root.
        python: interpreter of programs.
    """

    def __init__(self, uid: int, python: str):
        self._uid = uid
        found = subprocess.run(
            [python, "-I", "-c", "import sys; print(sys.prefix); print(sys.base_prefix); print(sys.executable)"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        prefix, base, executable = found.stdout.splitlines()
        own = executable == sys.executable
        # This program's own packages are no business of a program under test; those of another interpreter are.
        self._python = [os.path.realpath(python) if own else python, "-I", *(["-S"] if own else []), "-B", "-Xutf8"]
        self._prefixes = _visible([base] if own else [base, prefix], self._python[0])
        self.mode: str | None = None
        self._directory = ""  # only the weakest mode has one

    def choose_mode(self, unprotected_allowed: bool) -> list[str]:
        """Set the strongest mode in which a program runs; why stronger ones do not."""
        failures = []
        for mode in jail.MODES:
            if mode == "root" and os.geteuid() != 0:
                continue
            if mode == "limits" and not unprotected_allowed:
                break
            self.mode = mode
            if mode == "limits":
                self._directory = tempfile.mkdtemp(prefix="asyppo-program-")
                os.chmod(self._directory, 0o711)
                kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)
            report = self.run(PROBE)
            if report.get("passed") == 1:
                return failures
            failures.append(f"{mode}: {report.get('cause')}")
        self.mode = None
        return failures

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """The report of a job; "broken: ..." as its cause where the jail itself failed."""
        ours, theirs = os.pipe()
        try:
            middle = os.fork()
            if middle == 0:
                os.close(ours)
                self._enter(job, theirs)
        finally:
            os.close(theirs)
        try:
            text = _read_until(ours, time.monotonic() + job["limits"]["total_s"] + GRACE_S)
        finally:
            os.close(ours)
            os.kill(middle, signal.SIGKILL)  # it may be gone, but is not reaped yet
            os.waitpid(middle, 0)
            self._end_orphans()
        try:
            return dict(json.loads(text))
        except ValueError:
            return {"passed": 0, "total": len(job["tests"]), "cause": "broken: no report"}

    def _end_orphans(self) -> None:
        """Without namespaces: what outlived a jail's first process has come here."""
        while self.mode == "limits":
            kernel.kill_children()
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                return

    def close(self) -> None:
        if self._directory:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _enter(self, job: dict[str, Any], report: int) -> None:
        """In a process between this one and the jail's first: never returns."""
        assert self.mode is not None
        code = 1
        try:
            kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
            uid, gid = os.geteuid(), os.getegid()
            jail.enter_namespaces(self.mode, uid, gid)
            first = os.fork() if self.mode != "limits" else 0
            if first == 0:
                arguments = (self.mode, self._uid, self._python, self._prefixes, self._directory)
                found = serve_one(job, *arguments)
                os.write(report, json.dumps(found).encode())
            else:
                os.waitpid(first, 0)
            code = 0
        except BaseException as e:
            with contextlib.suppress(OSError):
                os.write(report, json.dumps({"passed": 0, "total": 0, "cause": f"broken: {e!r}"}).encode())
        finally:
            os._exit(code)


def _visible(prefixes: list[str], executable: str) -> list[str]:
    """What of the interpreter must be seen inside: its directories, not all of /usr."""
    paths = []
    for prefix in prefixes:
        paths += [prefix] if prefix not in ("/", "/usr", "/usr/local") else [f"{prefix.rstrip('/')}/lib"]
    hop = executable
    while True:  # every link on the way to the interpreter, and the interpreter
        if not any(hop.startswith(p + "/") for p in paths):
            paths.append(hop)
        if not os.path.islink(hop):
            return paths
        hop = os.path.normpath(os.path.join(os.path.dirname(hop), os.readlink(hop)))


def _read_until(fd: int, deadline: float) -> bytes:
    """All that comes through a pipe until it closes, or until the deadline."""
    data = b""
    while (left := deadline - time.monotonic()) > 0 and len(data) < 1 << 16:
        if not select.select([fd], [], [], left)[0]:
            break
        part = os.read(fd, 65536)
        if not part:
            break
        data += part
    return data
