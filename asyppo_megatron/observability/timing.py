"""Seconds and tokens by phase of a step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch

from asyppo_megatron.observability.board import Slot


class PhaseTimer:
    """Adds up the seconds of named phases; read once a step.

    On a CUDA device a phase lies between two events on the current stream, so its seconds are those of the device's
    work (and of the host, where the device waited for it). Nothing synchronises until `read`, which waits for the last
    event only; the peak of allocated memory is kept by phase too. Elsewhere the clock of the host is read, and memory
    has no peak that could be reset. Phases may nest; each counts in full.

    Args:
        device: where the phases compute; only its type matters.
        slot: of the launcher's board, which is told every phase, or None.
        deadline_s: longest that a phase may take, for the board; 0: any time.
    """

    def __init__(self, device: torch.device, slot: Slot | None = None, deadline_s: float = 0.0):
        self._slot, self._deadline_s = slot, deadline_s
        self._on_cuda, self._device = device.type == "cuda", device
        self._seconds: dict[str, float] = {}
        self._tokens: dict[str, int] = {}
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._free: list[torch.cuda.Event] = []
        self._open: list[str] = []
        self._peaks: dict[str, float] = {}
        self._peak_of_all = 0.0

    @contextmanager
    def phase(self, name: str, tokens: int = 0, *, role: str = "", deadline_s: float | None = None) -> Iterator[None]:
        """Count the block towards `name`, also when it raises.

        Args:
            tokens: tokens that the block processes, added up by phase.
            role: whose work it is, for the board.
            deadline_s: longest that it may take instead of the timer's, for the board.
        """
        patience = self._deadline_s if deadline_s is None else deadline_s
        noted = self._slot.during(name, patience, role) if self._slot is not None else nullcontext()
        with noted, self._timed(name, tokens):
            yield

    @contextmanager
    def _timed(self, name: str, tokens: int) -> Iterator[None]:
        self._seconds.setdefault(name, 0.0)
        if tokens:
            self.count(name, tokens)
        if self._on_cuda:
            self._note_peak()
            self._open.append(name)
            start = self._record()
            try:
                yield
            finally:
                self._pending.append((name, start, self._record()))
                self._note_peak()
                self._open.remove(name)
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
        """`seconds/<phase>`, `tokens/<phase>` and, on a CUDA device, `memory/<phase>_gb` (peak allocated, GiB).

        Since the last read, in order of first use; starts again from zero.
        """
        if self._pending:
            self._pending[-1][2].synchronize()  # recorded last on this stream: the others are complete then
        for name, start, end in self._pending:
            end.synchronize()  # returns at once unless phases ran on several streams
            self._seconds[name] += start.elapsed_time(end) / 1000.0
            self._free += [start, end]
        row: dict[str, float] = {f"seconds/{name}": seconds for name, seconds in self._seconds.items()}
        row.update({f"tokens/{name}": tokens for name, tokens in self._tokens.items()})
        row.update({f"memory/{name}_gb": peak for name, peak in self._peaks.items()})
        self._pending, self._seconds, self._tokens, self._peaks = [], {}, {}, {}
        return row

    @property
    def peak_gb(self) -> float:
        """Highest allocated memory of the device since the timer was made, GiB; 0 elsewhere."""
        if self._on_cuda:
            self._note_peak()
        return self._peak_of_all

    def _note_peak(self) -> None:
        """Credit the peak since the last note to every open phase; reads a counter of the host."""
        peak = torch.cuda.max_memory_allocated(self._device) / 2**30
        torch.cuda.reset_peak_memory_stats(self._device)
        for name in self._open:
            self._peaks[name] = max(self._peaks.get(name, 0.0), peak)
        self._peak_of_all = max(self._peak_of_all, peak)

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
