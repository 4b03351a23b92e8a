"""Work split over forked processes by bytes, with progress; an error in one ends all."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from asyppo_megatron.convert.progress import Progress

T = TypeVar("T")
_POLL_S = 0.2


def split(sizes: Sequence[int], parts: int) -> list[range]:
    """Consecutive ranges of items with about the same bytes each; fewer than `parts` when there are fewer items."""
    total, ranges, first, done = sum(sizes), [], 0, 0
    for i, size in enumerate(sizes):
        done += size
        if done * parts >= total * (len(ranges) + 1) or i == len(sizes) - 1:
            ranges.append(range(first, i + 1))
            first = i + 1
    return ranges


def default_processes() -> int:
    """Enough to keep a disk busy; more would cost memory, since each holds a tensor."""
    return min(len(os.sched_getaffinity(0)), 4)


def run_split(
    work: Callable[[int, range, Callable[[int], None]], T],
    sizes: Sequence[int],
    *,
    processes: int,
    progress: Progress,
) -> list[T]:
    """Run `work(index, items, report)` in forked processes, a single one in this; `report(bytes)` after each item.

    Returns:
        What each returned, in order of items.

    Raises:
        ValueError, OSError: as the first process that failed raised it; the others are ended.
    """
    parts = split(sizes, processes)
    if len(parts) == 1:
        return [_run_here(work, parts[0], progress)]
    running: dict[Connection, tuple[int, Any]] = {}
    results: dict[int, T] = {}
    done = 0
    try:
        for index, items in enumerate(parts):
            pipe, process = _start(work, index, items)
            running[pipe] = (index, process)
        while running:
            for pipe in wait(list(running), _POLL_S):
                index, process = running[pipe]  # type: ignore[index]
                for kind, value in _messages(pipe, process):
                    if kind == "bytes":
                        done += value
                    elif kind == "error":
                        raise value
                    else:
                        results[index] = value
                        running.pop(pipe)[1].join()  # type: ignore[arg-type]
            progress.show(done)
    finally:
        _end([process for _, process in running.values()])
    progress.close(done)
    return [results[i] for i in sorted(results)]


def _run_here(work: Callable[[int, range, Callable[[int], None]], T], items: range, progress: Progress) -> T:
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        progress.show(done)

    result = work(0, items, report)
    progress.close(done)
    return result


def _start(work: Callable[..., Any], index: int, items: range) -> tuple[Connection, Any]:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(work, index, items, theirs), daemon=True)
    process.start()
    theirs.close()
    return ours, process


def _end(processes: list[Any]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def _messages(pipe: Any, process: Any) -> Iterator[tuple[str, Any]]:
    """Everything a process has said so far; its silent death is an error too."""
    try:
        while True:
            message = pipe.recv()
            yield message
            if message[0] != "bytes" or not pipe.poll():
                return
    except EOFError:
        process.join()
        code = process.exitcode
        why = f"was killed by signal {signal.Signals(-code).name}" if code and code < 0 else f"exited with {code}"
        yield "error", OSError(f"a converter process {why}; if memory ran out, use fewer --processes")


def _child(work: Callable[..., Any], index: int, items: range, pipe: Any) -> None:
    parent = os.getppid()

    def report(count: int) -> None:
        if os.getppid() != parent:
            os._exit(1)  # the parent was killed: nobody will finish this
        pipe.send(("bytes", count))

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        pipe.send(("result", work(index, items, report)))
    except (ValueError, OSError) as e:
        pipe.send(("error", e))
    finally:
        pipe.close()
