"""Starts the ranks of a run on this machine: import once, fork, watch, end together.

Importing torch, Megatron-Core and transformers costs about six seconds a process (20 with four at once); forking
after the imports costs none. Nothing may compute with torch before the fork. Under torchrun or srun the ranks
exist already and this module is not used.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from asyppo_megatron.backend.processes import die_with_parent

_GRACE_S = 10.0
logger = logging.getLogger(__name__)


class RankFailed(RuntimeError):
    """A rank ended before its work was done."""


def is_launched() -> bool:
    """Whether torchrun or srun started this process as one rank of a world."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def run_ranks(num_ranks: int, main: Callable[[int], None]) -> None:
    """Fork `num_ranks` ranks that call `main(rank)`; return when all are done.

    The parent hosts the rendezvous store on a loopback port that the kernel chose, so no two runs collide.

    Raises:
        RankFailed: a rank ended with an error or a signal; the others have been ended too.
        KeyboardInterrupt: passed on after the ranks have been ended.
    """
    store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), wait_for_workers=False)
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # torch's name for: the store is hosted outside the ranks
        "WORLD_SIZE": str(num_ranks),
    }
    sys.stdout.flush()
    sys.stderr.flush()
    children = {_fork(rank, environment, main): rank for rank in range(num_ranks)}
    previous = signal.signal(signal.SIGTERM, _raise_interrupt)
    try:
        _watch(children)
    finally:
        signal.signal(signal.SIGTERM, previous)
        _end(children)


def _raise_interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt(f"signal {signum}")


def _fork(rank: int, environment: dict[str, str], main: Callable[[int], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        die_with_parent()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
        os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
        main(rank)
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # without the parent's exit handlers and its store's destructor


def _watch(children: dict[int, int]) -> None:
    """Wait for all children; raise as soon as one fails. Removes those that ended from `children`."""
    while children:
        pid, status = os.wait()
        if pid not in children:
            continue
        rank = children.pop(pid)
        code = os.waitstatus_to_exitcode(status)
        if code:
            how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            raise RankFailed(f"rank {rank} (process {pid}) ended {how}; the run is stopped, start it again to resume")


def _end(children: dict[int, int]) -> None:
    """SIGTERM, a grace period, SIGKILL; returns when no child is left."""
    for sig, grace in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, 60.0)):
        for pid in children:
            os.kill(pid, sig)
        deadline = time.monotonic() + grace
        while children and time.monotonic() < deadline:
            pid, _ = os.waitpid(-1, os.WNOHANG)
            if pid:
                children.pop(pid, None)
            else:
                time.sleep(0.02)
        if not children:
            return
