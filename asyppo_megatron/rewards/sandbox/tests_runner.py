"""The first process of a jail: it runs a program against its tests, watches it, and reports.

The program and what it starts are the only other processes of the jail. Expected outputs stay in this process.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import selectors
import signal
import time
from dataclasses import dataclass, field
from typing import Any

from . import jail, kernel

LOOK_EVERY_S = 0.02  # between two looks at memory and processes
STDERR_KEPT = 4096
UNSTARTED = 126  # exit code of a process that did not get as far as the interpreter
PROGRAM = "/program.py"
# Tests made of statements share the interpreter with the program. The last line proves that all of them were reached:
# a program that ends early does not know the number, which arrives together with the tests.
CHECKED = """
import json, os, sys
space = {"__name__": "__main__"}
exec(compile(open(sys.argv[1]).read(), "program.py", "exec"), space)
with open(int(sys.argv[2])) as pipe:
    code, number = json.load(pipe)
exec(compile(code, "tests.py", "exec"), space)
os.write(int(sys.argv[3]), number.encode())
os._exit(0)
"""


@dataclass
class _Watched:
    """A program under way.

    Attributes:
        output, errors: what it wrote, the latter's end only.
        written: bytes that it wrote to both.
        cause: why it was ended, where it was.
        code: of its exit, negative for a signal.
    """

    output: bytearray = field(default_factory=bytearray)
    errors: bytearray = field(default_factory=bytearray)
    written: int = 0
    cause: str = ""
    code: int | None = None


class TestsRunner:
    """Runs one program against tests.

    Args:
        mode: of the jail.
        limits: of the program.
        uid: of the program in the modes that can set one.
        python: the interpreter and its options.
        program: path of the program, readable inside.
        directory: its working directory.
        proc: descriptor of the jail's /proc, or None.
    """

    def __init__(
        self,
        mode: str,
        limits: jail.Limits,
        uid: int,
        python: list[str],
        program: str,
        directory: str,
        proc: int | None,
    ):
        self._mode, self._limits, self._uid, self._python = mode, limits, uid, python
        self._program, self._directory, self._proc = program, directory, proc
        self._deadline = time.monotonic() + limits.total_s

    def run(self, tests: list[dict[str, str]], stop_at_failure: bool) -> dict[str, Any]:
        """Passed and total tests, and the cause of the first failure: "wrong" or what ended the program."""
        passed, cause = 0, ""
        for test in tests:
            found = self._run_test(test) if time.monotonic() < self._deadline else "timeout"
            passed += found == ""
            cause = cause or found
            if (found and stop_at_failure) or (found == "timeout" and time.monotonic() >= self._deadline):
                break
        return {"passed": passed, "total": len(tests), "cause": cause}

    def _run_test(self, test: dict[str, str]) -> str:
        """Empty where the test passes, else the cause."""
        jail.fresh_work_directory(self._mode, self._limits, self._uid, self._directory)
        if "assert" not in test:
            watched = self._watch([*self._python, self._program], test["stdin"].encode("utf-8", "replace"), None)
            return _cause(watched) or ("" if same_output(watched.output, test["stdout"]) else "wrong")
        number = secrets.token_hex(16)
        message = json.dumps([test["assert"], number]).encode()
        watched = self._watch([*self._python, "-c", CHECKED, self._program], b"", message)
        if watched.code == 0 and bytes(watched.output[-len(number) :]) != number.encode():
            return "wrong"  # it ended before the tests did
        if b"AssertionError" in watched.errors[-1000:] and not watched.cause and watched.code == 1:
            return "wrong"
        return _cause(watched)

    def _watch(self, command: list[str], stdin: bytes, message: bytes | None) -> _Watched:
        """Start the program, feed it, and end it at its exit or its first excess."""
        pipes = [os.pipe() for _ in range(4 if message is not None else 3)]
        theirs = [pipes[0][0], pipes[1][1], pipes[2][1], *([pipes[3][0]] if message is not None else [])]
        report = os.dup(pipes[1][1]) if message is not None else None
        child = os.fork()
        if child == 0:
            self._become_program(command, theirs, report)
        for fd in [*theirs, *([report] if report is not None else [])]:
            os.close(fd)
        feeds = {pipes[0][1]: memoryview(stdin)}
        if message is not None:
            feeds[pipes[3][1]] = memoryview(message)
        watched = _Watched()
        pidfd = os.pidfd_open(child)
        try:
            self._attend(watched, feeds, pipes[1][0], pipes[2][0], pidfd)
        finally:
            watched.code = self._end_all(child)
            for fd in feeds:
                os.close(fd)
            self._drain(watched, pipes[1][0])
            self._drain(watched, pipes[2][0], errors=True)
            for fd in (pipes[1][0], pipes[2][0], pidfd):
                os.close(fd)
        return watched

    def _become_program(self, command: list[str], fds: list[int], report: int | None) -> None:
        """In the new process: never returns, whatever happens."""
        try:
            fds = fds if report is None else [*fds, report]
            high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in fds]  # out of the way of the numbers below
            for number, fd in enumerate(high):
                os.dup2(fd, number)
            os.closerange(len(high), 1 << 20)
            if report is not None:
                command = [*command, "3", "4"]
            jail.confine(self._mode, self._limits, self._uid, self._directory)
            home = self._directory
            environment = {"HOME": home, "TMPDIR": home, "LANG": "C.UTF-8", "PATH": "/usr/bin:/bin"}
            os.execve(command[0], command, environment)
        except BaseException as e:
            with contextlib.suppress(OSError):
                os.write(2, f"jail: {e!r}".encode())
        finally:
            os._exit(UNSTARTED)

    def _attend(self, watched: _Watched, feeds: dict[int, memoryview], out: int, err: int, pidfd: int) -> None:
        """Feed, read and look until the program's first process ends or something is exceeded."""
        deadline = min(time.monotonic() + self._limits.test_s, self._deadline)
        with selectors.DefaultSelector() as selector:
            for fd in (out, err, pidfd):
                selector.register(fd, selectors.EVENT_READ)
            for fd in feeds:
                selector.register(fd, selectors.EVENT_WRITE)
            for fd in (out, err, *feeds):
                os.set_blocking(fd, False)
            while not watched.cause:
                for key, _ in selector.select(LOOK_EVERY_S):
                    if key.fd == pidfd:
                        return
                    if key.fd in feeds:
                        feeds[key.fd] = _feed(key.fd, feeds[key.fd])
                        if not feeds[key.fd]:
                            selector.unregister(key.fd)
                            os.close(key.fd)
                            del feeds[key.fd]
                    elif not self._read(watched, key.fd, key.fd == err):
                        selector.unregister(key.fd)
                watched.cause = watched.cause or self._excess(deadline)

    def _excess(self, deadline: float) -> str:
        if time.monotonic() >= deadline:
            return "timeout"
        threads, memory = jail.usage(self._proc)
        if memory > self._limits.memory:
            return "memory"
        return "processes" if threads > self._limits.processes else ""

    def _read(self, watched: _Watched, fd: int, errors: bool) -> bool:
        """Take what there is; whether more may come."""
        try:
            data = os.read(fd, 65536)
        except BlockingIOError:
            return True
        if errors:
            watched.errors += data
            del watched.errors[:-STDERR_KEPT]
        else:
            watched.output += data
        watched.written += len(data)
        if watched.written > 2 * self._limits.output_bytes or len(watched.output) > self._limits.output_bytes:
            watched.cause = watched.cause or "output"
        return bool(data)

    def _drain(self, watched: _Watched, fd: int, errors: bool = False) -> None:
        """What is still in a pipe whose writers are dead."""
        while watched.cause != "output" and self._read(watched, fd, errors) and not _is_empty(fd):
            pass

    def _end_all(self, child: int) -> int:
        """Kill the program with everything it started; the exit code of its first process."""
        code = -signal.SIGKILL
        patience = time.monotonic() + 10
        while time.monotonic() < patience:
            self._kill_all()
            try:
                pid, status = os.waitpid(-1, 0 if self._mode != "limits" else os.WNOHANG)
            except ChildProcessError:
                return code
            if pid == child:
                code = os.waitstatus_to_exitcode(status)
            elif pid == 0:
                time.sleep(0.002)
        return code

    def _kill_all(self) -> None:
        if self._mode != "limits":
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)  # all of the PID namespace but this process
            return
        kernel.kill_children()  # orphans come here too: it is their subreaper


def _is_empty(fd: int) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        return not selector.select(0)


def _feed(fd: int, data: memoryview) -> memoryview:
    """Write what fits; what is left, nothing where the reader is gone."""
    try:
        return data[os.write(fd, data[:65536]) :]
    except BlockingIOError:
        return data
    except BrokenPipeError:
        return data[:0]


def _cause(watched: _Watched) -> str:
    """What ended the program, empty where it ended by itself and well."""
    if watched.cause:
        return watched.cause
    if watched.code == 0:
        return ""
    if watched.code == UNSTARTED and watched.errors.startswith(b"jail: "):
        return f"broken: {watched.errors.decode('utf-8', 'replace')}"
    if watched.code == -signal.SIGSYS:
        return "forbidden"
    if watched.code in (-signal.SIGXCPU, -signal.SIGKILL):
        return "timeout"
    if b"MemoryError" in watched.errors:
        return "memory"
    return "error" if watched.code and watched.code > 0 else "crash"


def same_output(output: bytes | bytearray, expected: str) -> bool:
    """Equal but for white space at the ends of lines and of the whole."""

    def lines(text: str) -> list[str]:
        return [line.rstrip() for line in text.rstrip().split("\n")]

    return lines(output.decode("utf-8", "replace")) == lines(expected)


def serve_one(job: dict[str, Any], mode: str, uid: int, python: list[str], prefixes: list[str], directory: str) -> Any:
    """In the first process of a new jail: build it, run the job, return its report."""
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    limits = jail.Limits(**job["limits"])
    program, proc = PROGRAM, None
    if mode == "limits":
        program, directory = os.path.join(directory, "program.py"), os.path.join(directory, "work")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(program)
        with open(program, "wb") as file:
            file.write(job["program"].encode("utf-8", "replace"))
        os.chmod(program, 0o444)
    else:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # when memory runs out, these go first
        proc = jail.build_root("/sys", prefixes, {PROGRAM: job["program"].encode("utf-8", "replace")})
        jail.seal_root()
        directory = jail.WORK
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)  # the expected outputs stay in here
    runner = TestsRunner(mode, limits, uid, python, program, directory, proc)
    return runner.run(job["tests"], job["stop_at_failure"])
