"""A line on the terminal: bytes done, speed, time left."""

from __future__ import annotations

import sys
import time


class Progress:
    """Redraws one line on a terminal; on a log file writes a line at the end only.

    Args:
        what: words that the line begins with.
        total: bytes to do.
        quiet: write nothing.
    """

    def __init__(self, what: str, total: int, *, quiet: bool = False):
        self.what, self.total, self.quiet = what, total, quiet
        self._started = time.monotonic()
        self._live = sys.stderr.isatty() and not quiet

    def _line(self, done: int) -> str:
        seconds = max(time.monotonic() - self._started, 1e-6)
        speed = done / seconds
        left = (self.total - done) / speed if speed else float("inf")
        share = done / self.total if self.total else 1.0
        size = f"{done / 1e9:.2f}/{self.total / 1e9:.2f} GB {share:4.0%}"
        rest = f"{left:.0f} s left" if done < self.total else f"in {seconds:.1f} s"
        return f"{self.what}: {size}, {speed / 1e6:.0f} MB/s, {rest}"

    def show(self, done: int) -> None:
        if self._live:
            sys.stderr.write(f"\r\033[K{self._line(done)}")
            sys.stderr.flush()

    def close(self, done: int) -> None:
        if not self.quiet:
            sys.stderr.write(("\r\033[K" if self._live else "") + self._line(done) + "\n")
