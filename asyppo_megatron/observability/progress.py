"""One live line on a terminal; plain log lines everywhere else."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Mapping
from typing import TextIO

from asyppo_megatron.observability.timing import seconds_by_phase

logger = logging.getLogger(__name__)

# name in the line, metric, format
COLUMNS = (
    ("reward", "reward", "{:.3f}"),
    ("accuracy", "accuracy", "{:.3f}"),
    ("entropy", "entropy", "{:.3f}"),
    ("value-std", "value_std", "{:.4f}"),
)
TOTAL_PHASE = "step"


def format_step(row: Mapping[str, object], num_steps: int) -> str:
    """A metrics row as one line: `step 3/40  reward 0.531  ...  2.1 s: generate 0.9, actor 0.7, critics 0.5`.

    Metrics that the row does not have are left out. `seconds/step` is the total; without it the phases are added up.
    """
    parts = [f"step {row.get('step')}/{num_steps}"]
    parts += [
        f"{label} {form.format(row[name])}" for label, name, form in COLUMNS if isinstance(row.get(name), int | float)
    ]
    phases = seconds_by_phase(row)
    total = phases.pop(TOTAL_PHASE, None)
    if phases or total is not None:
        seconds = f"{sum(phases.values()) if total is None else total:.1f} s"
        parts.append(seconds + (": " + ", ".join(f"{name} {s:.1f}" for name, s in phases.items()) if phases else ""))
    parts += [
        f"{name} {value:.3f}"
        for name, value in row.items()
        if name.startswith("eval/") and isinstance(value, int | float)
    ]
    return "  ".join(parts)


class Progress:
    """The progress of a run, for one process (rank 0).

    On a terminal one line is drawn over and over; the newest evaluation stays in it. Every step also goes to the log
    at INFO: to the log file always, and to stderr where that is not a terminal (see `logs.py`).

    Args:
        num_steps: steps of the whole run.
        stream: where the live line goes when it is a terminal; stderr by default.
    """

    def __init__(self, num_steps: int, stream: TextIO | None = None):
        self._num_steps = num_steps
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._line = ""
        self._evals: dict[str, object] = {}

    def step(self, row: Mapping[str, object]) -> None:
        """Show a finished step (or an evaluation between steps: a row with `eval/` metrics)."""
        logger.info("%s", format_step(row, self._num_steps))
        self._evals.update({name: value for name, value in row.items() if name.startswith("eval/")})
        shown = {name: value for name, value in row.items() if not name.startswith("eval/")}
        self._line = format_step({**shown, **self._evals}, self._num_steps)
        self._draw(self._line)

    def status(self, what: str) -> None:
        """Show what runs right now, behind the last step's figures; nothing off a terminal."""
        self._draw(f"{self._line}  [{what}]" if self._line else what)

    def note(self, text: str) -> None:
        """A line that stays: where a file was written, how an evaluation ended."""
        logger.info("%s", text)
        if self._live:
            self._stream.write(f"\r\x1b[K{text}\n")
            self._draw(self._line)

    def close(self) -> None:
        """Leave the last line standing; may be called twice."""
        if self._live and self._line:
            self._draw(self._line)
            self._stream.write("\n")
            self._stream.flush()
        self._line = ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _draw(self, text: str) -> None:
        if self._live:
            width = shutil.get_terminal_size().columns - 1  # a full line would wrap and then not be wiped
            self._stream.write("\r\x1b[K" + (text if len(text) <= width else text[: width - 1] + "…"))
            self._stream.flush()
