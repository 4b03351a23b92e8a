"""One forked rank: how it begins, what it reports, where its output goes, how it is ended."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from asyppo_megatron.backend.processes import die_with_parent
from asyppo_megatron.types import RunError

EXIT_STOPPED = 75  # of a rank and of a launcher: stopped as asked, to be started again (sysexits: temporary failure)
_END_S = 60.0
_MAX_REPORT = 32_000  # characters of a traceback: a report must fit into a pipe that nobody reads yet
_SAYS_ENOUGH = (ValueError, RunError, OSError)  # errors whose message is meant for the user


@dataclass(frozen=True)
class Report:
    """What a failing rank tells its launcher. at: seconds of the wall clock, compared between nodes."""

    at: float
    message: str
    traceback: str


@dataclass
class Child:
    """A forked rank. start: pipe to it; pipe: from it."""

    rank: int
    pid: int
    start: int
    pipe: int
    code: int | None = None
    report: Report | None = None

    def go(self, port: int) -> None:
        """Let it begin: the store is at this port."""
        with contextlib.suppress(BrokenPipeError):  # it has ended: the supervisor will see
            os.write(self.start, str(port).encode())

    def close(self) -> None:
        os.close(self.start)
        os.close(self.pipe)

    def read_report(self) -> None:
        """Take what the rank has written, if anything."""
        try:
            text = os.read(self.pipe, 1 << 20)
        except BlockingIOError:
            return
        if text and self.report is None:
            self.report = Report(**json.loads(text))

    def show_stacks(self) -> None:
        """Have it write the stacks of its threads to its log; a stopped process does so when it goes on."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGUSR2)


def fork_rank(
    rank: int,
    environment: dict[str, str],
    main: Callable[[int], None],
    log_dir: Path | None,
    ignored: Sequence[signal.Signals],
) -> Child:
    """Fork a rank that calls `main(rank)` once it is let go.

    Args:
        environment: set in it, beside RANK and MASTER_PORT.
        ignored: signals that it, and all that it starts, leave to the launcher.
    """
    parent = os.getpid()
    ours, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    wait, start = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid:
        os.close(theirs)
        os.close(wait)
        return Child(rank, pid, start, ours)
    code = 1
    try:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
        die_with_parent(parent)
        os.close(ours)
        os.close(start)
        if log_dir is not None:
            _redirect_output(log_dir / f"rank-{rank:05d}.log")
        faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)
        # Whole lines, also under PYTHONUNBUFFERED: ranks that share a terminal must not break into each other's.
        sys.stdout.reconfigure(line_buffering=True, write_through=False)
        port = os.read(wait, 16).decode()
        os.environ.update(environment, MASTER_PORT=port, RANK=str(rank))
        main(rank)
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    except BaseException as e:
        _report(theirs, rank, e, is_logged=log_dir is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # without the parent's exit handlers and its store's destructor


def _redirect_output(path: Path) -> None:
    """stdout and stderr of this process and its libraries into a file; `sys.stderr` stays what it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def _report(pipe: int, rank: int, error: BaseException, *, is_logged: bool) -> None:
    """Tell the launcher, which knows whose error to show, and this rank's log where stderr is that."""
    text = "".join(traceback.format_exception(error))
    message = f"rank {rank} failed: {type(error).__name__}: {error}"
    if isinstance(error, _SAYS_ENOUGH):
        message = str(error) if isinstance(error, RunError) else f"rank {rank} failed: {error}"
        shown = ""
    else:
        shown = text[-_MAX_REPORT:]
    report = Report(time.time(), message[:_MAX_REPORT], shown)
    os.write(pipe, json.dumps(asdict(report)).encode())
    if is_logged:
        os.write(2, text.encode())


def reap(children: dict[int, Child]) -> None:
    """Note every child that has ended by now; the order in which they are reaped says nothing."""
    for pid, child in children.items():
        if child.code is None:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                child.code = os.waitstatus_to_exitcode(status)


def end(children: dict[int, Child]) -> None:
    """SIGKILL to all that are left, returning when there is none.

    Nothing politer: ranks ignore SIGTERM so that one sent to a whole job does not cut a step, and have nothing to tidy
    that outlives them (what they leave in shared memory the next start removes).
    """
    for pid, child in children.items():
        if child.code is None:
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + _END_S
    while any(child.code is None for child in children.values()) and time.monotonic() < deadline:
        reap(children)
        time.sleep(0.01)
