"""math-verify in killable worker processes."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from asyppo_megatron.rewards.base import MAX_CHARACTERS, Sample, Verdict
from asyppo_megatron.rewards.pool import Failed, WorkerPool

MAX_REPLY_BYTES = 4096


class MathVerifier:
    """Scores with math-verify; a call that hangs or crashes costs its worker and is scored 0 with its status."""

    def __init__(self, workers: int, timeout_s: float, memory_gb: float):
        """Args: worker processes, hard limit of one call in seconds, address space of a worker in GB."""
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError("reward.kind: got math, need the package math-verify; install it or choose exact")
        limits = [str(os.getpid()), str(timeout_s), str(int(memory_gb * 2**30))]
        script = str(Path(__file__).with_name("math_worker.py"))
        self._pool = WorkerPool(
            "math verifier",
            # -P: this folder has a math.py, which must not stand in for the library's.
            lambda slot, fd: [sys.executable, "-P", script, str(fd), *limits],
            workers=workers,
            timeout_s=timeout_s,
            max_reply=MAX_REPLY_BYTES,
            environment=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            advice="raise reward.memory_gb",
        )

    def score_many(self, samples: Sequence[Sample]) -> list[Verdict]:
        """Verdicts in the samples' order; never raises for a response."""
        replies = self._pool.run([[s[0][-MAX_CHARACTERS:], s[1][:MAX_CHARACTERS]] for s in samples])
        return [Verdict(0.0, r.status) if isinstance(r, Failed) else Verdict(float(r[0]), r[1]) for r in replies]

    def close(self) -> None:
        self._pool.close()
