"""Starts the ranks of a run on this machine: import once, fork, watch, end together.

Importing torch, Megatron-Core and transformers costs about six seconds a process (20 with four at once); forking
after the imports costs none. Nothing may compute with torch before the fork. Under torchrun or srun the ranks
exist already and this module is not used.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from asyppo_megatron.backend.processes import die_with_parent
from asyppo_megatron.types import RunError

_GRACE_S = 10.0
_MAX_REPORT = 32_000  # characters of a traceback: a report must fit into a pipe that nobody reads yet
_SAYS_ENOUGH = (ValueError, RunError, OSError)  # errors whose message is meant for the user


class RankFailed(RuntimeError):
    """A rank ended before its work was done.

    Attributes:
        traceback: of the rank that failed first; empty where its message says enough.
    """

    def __init__(self, message: str, traceback: str = ""):
        super().__init__(message)
        self.traceback = traceback


class Stopped(KeyboardInterrupt):
    """A signal asked the launcher to stop."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


@dataclass(frozen=True)
class _Report:
    """What a failing rank tells its launcher. at: monotonic seconds of this machine."""

    at: float
    message: str
    traceback: str


@dataclass
class _Child:
    """A forked rank. start: pipe to it; pipe: from it."""

    rank: int
    pid: int
    start: int
    pipe: int
    code: int | None = None
    report: _Report | None = None

    def go(self, port: int) -> None:
        """Let it begin: the store is at this port."""
        with contextlib.suppress(BrokenPipeError):  # it has ended: `_watch` will see
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
        if text:
            self.report = _Report(**json.loads(text))


def is_launched() -> bool:
    """Whether torchrun or srun started this process as one rank of a world."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def run_ranks(num_ranks: int, main: Callable[[int], None], log_dir: Path | None = None) -> None:
    """Fork `num_ranks` ranks that call `main(rank)`; return when all are done.

    The parent hosts the rendezvous store on a loopback port that the kernel chose, so no two runs collide. It starts
    after the last fork: its thread looks up the names of those who connect, and a rank forked at such a moment
    would inherit the C library's locked resolver and hang.

    Args:
        log_dir: what libraries write to a rank's stdout and stderr goes to `rank-<rank>.log` here, and tracebacks of
            all ranks; without it output stays where it was.

    Raises:
        RankFailed: a rank ended with an error or a signal; the others have been ended too.
        KeyboardInterrupt: passed on after the ranks have been ended; `Stopped` where the signal was SIGTERM.
    """
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # torch's name for: the store is hosted outside the ranks
        "WORLD_SIZE": str(num_ranks),
    }
    sys.stdout.flush()
    sys.stderr.flush()
    children: dict[int, _Child] = {}
    previous = signal.signal(signal.SIGTERM, _stop)
    try:
        for rank in range(num_ranks):
            child = _fork(rank, environment, main, log_dir)
            children[child.pid] = child
        store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), wait_for_workers=False)
        for child in children.values():
            child.go(store.port)
        _watch(children, log_dir)
    finally:
        signal.signal(signal.SIGTERM, previous)
        _end(children)
        for child in children.values():
            child.close()


def _stop(signum: int, frame: object) -> None:
    raise Stopped(signum)


def _fork(rank: int, environment: dict[str, str], main: Callable[[int], None], log_dir: Path | None) -> _Child:
    parent = os.getpid()
    ours, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    wait, start = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid:
        os.close(theirs)
        os.close(wait)
        return _Child(rank, pid, start, ours)
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
        die_with_parent(parent)
        os.close(ours)
        os.close(start)
        if log_dir is not None:
            _redirect_output(log_dir / f"rank-{rank:05d}.log")
        # Whole lines, also under PYTHONUNBUFFERED: ranks that share a terminal must not break into each other's.
        sys.stdout.reconfigure(line_buffering=True, write_through=False)
        port = os.read(wait, 16).decode()
        os.environ.update(environment, MASTER_PORT=port, RANK=str(rank), LOCAL_RANK=str(rank))
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
    report = _Report(time.monotonic(), message[:_MAX_REPORT], shown)
    os.write(pipe, json.dumps(asdict(report)).encode())
    if is_logged:
        os.write(2, text.encode())


def _watch(children: dict[int, _Child], log_dir: Path | None) -> None:
    """Wait for all children; raise as soon as one fails."""
    while any(child.code is None for child in children.values()):
        pid, status = os.wait()
        while pid:  # all that have ended by now: the order in which they are reaped says nothing
            if pid in children:
                children[pid].code = os.waitstatus_to_exitcode(status)
            pid, status = _reap(os.WNOHANG)
        if any(child.code for child in children.values()):
            for child in children.values():
                child.read_report()
            raise _failure(list(children.values()), log_dir)


def _reap(options: int) -> tuple[int, int]:
    try:
        return os.waitpid(-1, options)
    except ChildProcessError:
        return 0, 0


def _failure(children: list[_Child], log_dir: Path | None) -> RankFailed:
    """The one failure that explains the others: a killed rank, or the error that was reported first.

    The ranks that lost it as a peer fail too, later, and say nothing of interest.
    """
    where = f"; logs of all ranks: {log_dir}" if log_dir is not None else ""
    for child in children:
        if child.code is not None and child.code < 0:
            name = signal.Signals(-child.code).name
            hint = ", perhaps for lack of memory" if name == "SIGKILL" else ""
            return RankFailed(f"rank {child.rank} (process {child.pid}) was killed by {name}{hint}{where}")
    reports = [(child.report.at, child.rank, child.report) for child in children if child.report is not None]
    if reports:
        _, _, report = min(reports, key=lambda r: r[:2])
        return RankFailed(f"{report.message}{where}", report.traceback)
    child = next(c for c in children if c.code)
    return RankFailed(f"rank {child.rank} (process {child.pid}) ended with exit code {child.code}{where}")


def _end(children: dict[int, _Child]) -> None:
    """SIGTERM, a grace period, SIGKILL; returns when no child is left."""
    for sig, grace in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, 60.0)):
        left = {pid for pid, child in children.items() if child.code is None}
        for pid in left:
            os.kill(pid, sig)
        deadline = time.monotonic() + grace
        while left and time.monotonic() < deadline:
            pid, status = _reap(os.WNOHANG)
            if pid in left:
                children[pid].code = os.waitstatus_to_exitcode(status)
                left.remove(pid)
            else:
                time.sleep(0.02)
        if not left:
            return
