"""Pass rates of problems, and which of them come up: pure functions and a table that survives a resume.

A problem of pass rate p is taken, when its turn in the epoch's order comes, with probability

    a(p) = floor + (1 - floor) 4 p (1 - p),

1 where half of its responses are correct, `floor` where all or none are (a group of equal rewards teaches a group
advantage nothing, and a critic little). A problem without a response yet is taken. Whether it is taken is decided by a
random number of (seed, epoch, problem), so that a resumed run decides the same.
"""

from __future__ import annotations

import base64
import zlib

import numpy as np

_STREAM = 0xC0221C  # keeps these random numbers apart from those of the epochs' orders


def acceptance(passes: np.ndarray, tries: np.ndarray, floor: float) -> np.ndarray:
    """a(p) of each problem, f64; 1 where nothing is known.

    Args:
        passes, tries: correct and all remembered responses of each problem.
        floor: in (0, 1].
    """
    rate = passes / np.maximum(tries, 1)
    return np.where(tries > 0, floor + (1 - floor) * 4 * rate * (1 - rate), 1.0)


def is_taken(probability: float, *, seed: int, epoch: int, problem: int) -> bool:
    """Whether a problem is taken at its turn."""
    if probability >= 1.0:
        return True
    return bool(np.random.default_rng([_STREAM, seed, epoch, problem]).random() < probability)


class PassRates:
    """Correct and all responses of every problem of a source, of which old ones fade.

    Args:
        count: problems.
        memory: responses that are remembered; beyond, both numbers are scaled down to it, to whole numbers, so that a
            state read back is the same state.
    """

    def __init__(self, count: int, memory: int):
        self.passes, self.tries = np.zeros(count, np.uint16), np.zeros(count, np.uint16)
        self._memory = memory

    def record(self, problem: int, passes: int, tries: int) -> None:
        """Add responses to a problem."""
        total, right = int(self.tries[problem]) + tries, int(self.passes[problem]) + passes
        if total > self._memory:
            right, total = round(right * self._memory / total), self._memory
        self.tries[problem], self.passes[problem] = total, right

    def state(self) -> str:
        """Everything, as text: the visited problems only, compressed."""
        visited = np.flatnonzero(self.tries).astype("<u4")
        columns = visited, self.passes[visited].astype("<u2"), self.tries[visited].astype("<u2")
        return base64.b64encode(zlib.compress(b"".join(c.tobytes() for c in columns))).decode()

    def restore(self, state: str) -> None:
        """What `state` returned."""
        data = zlib.decompress(base64.b64decode(state))
        count = len(data) // 8
        visited = np.frombuffer(data, "<u4", count)
        self.passes[:], self.tries[:] = 0, 0
        self.passes[visited] = np.frombuffer(data, "<u2", count, 4 * count)
        self.tries[visited] = np.frombuffer(data, "<u2", count, 6 * count)

    def mean(self) -> float:
        """Mean pass rate of the problems with responses; 0 without any."""
        visited = self.tries > 0
        return float((self.passes[visited] / self.tries[visited]).mean()) if visited.any() else 0.0
