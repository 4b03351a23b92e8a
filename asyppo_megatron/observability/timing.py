"""Seconds and tokens by phase of a step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch


class PhaseTimer:
    """Adds up the seconds of named phases; read once a step.

    On a CUDA device a phase lies between two events on the current stream, so its seconds are those of the device's
    work (and of the host, where the device waited for it). Nothing synchronises until `read`, which waits for the last
    event only. Elsewhere the clock of the host is read. Phases may nest; each counts in full.

    Args:
        device: where the phases compute; only its type matters.
    """

    def __init__(self, device: torch.device):
        self._on_cuda = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._tokens: dict[str, int] = {}
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._free: list[torch.cuda.Event] = []

    @contextmanager
    def phase(self, name: str, tokens: int = 0) -> Iterator[None]:
        """Count the block towards `name`, also when it raises.

        Args:
            tokens: tokens that the block processes, added up by phase.
        """
        self._seconds.setdefault(name, 0.0)
        if tokens:
            self.count(name, tokens)
        if self._on_cuda:
            start = self._record()
            try:
                yield
            finally:
                self._pending.append((name, start, self._record()))
        else:
            began = time.perf_counter()
            try:
                yield
            finally:
                self._seconds[name] += time.perf_counter() - began

    def add(self, name: str, seconds: float) -> None:
        """Count seconds that were measured elsewhere, by the rollout driver for instance."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def count(self, name: str, tokens: int) -> None:
        """Count tokens towards a phase, where they are known only after it."""
        self._tokens[name] = self._tokens.get(name, 0) + tokens

    def read(self) -> dict[str, float]:
        """`seconds/<phase>` and `tokens/<phase>` since the last read, in order of first use; starts again from zero."""
        if self._pending:
            self._pending[-1][2].synchronize()  # recorded last on this stream: the others are complete then
        for name, start, end in self._pending:
            end.synchronize()  # returns at once unless phases ran on several streams
            self._seconds[name] += start.elapsed_time(end) / 1000.0
            self._free += [start, end]
        row: dict[str, float] = {f"seconds/{name}": seconds for name, seconds in self._seconds.items()}
        row.update({f"tokens/{name}": tokens for name, tokens in self._tokens.items()})
        self._pending, self._seconds, self._tokens = [], {}, {}
        return row

    def _record(self) -> torch.cuda.Event:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def seconds_by_phase(row: Mapping[str, object]) -> dict[str, float]:
    """The `seconds/<phase>` entries of a metrics row, by phase, in the row's order."""
    return {
        name.removeprefix("seconds/"): float(value)
        for name, value in row.items()
        if name.startswith("seconds/") and isinstance(value, int | float)
    }
