"""A user's reward function, in killable worker processes."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asyppo_megatron.config import RewardConfig
from asyppo_megatron.rewards.base import Sample, Verdict
from asyppo_megatron.rewards.pool import Failed, WorkerPool

log = logging.getLogger(__name__)

ERRORS_SHOWN = 5  # of a call's first, in the log


class FunctionReward:
    """Calls `function(response=, answer=, problem=, extra=)`, with `steps=` or `tokens=` where it scores pieces.

    Raises:
        ValueError: it cannot be imported, or is no function.
    """

    def __init__(self, config: RewardConfig):
        self._per, self._name = config.per, config.function
        script = str(Path(__file__).with_name("function_worker.py"))
        options = [str(os.getpid()), str(config.timeout_s), str(int(config.memory_gb * 2**30)), config.function]
        piece_name = {"step": "steps", "token": "tokens"}.get(config.per, "")
        self._pool = WorkerPool(
            f"reward function {config.function}",
            lambda slot, fd: [sys.executable, "-P", script, str(fd), *options, piece_name],
            workers=config.workers,
            timeout_s=config.timeout_s,
            max_reply=1 << 24,
            environment=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            advice="raise reward.memory_gb",
        )
        try:
            greeting = self._pool.wait_until_ready()
            if greeting != "ready":
                raise ValueError(f"reward.function: got {config.function!r}, which cannot be used: {greeting}")
        except (ValueError, RuntimeError):
            self._pool.close()
            raise

    def score_many(self, samples: Sequence[Sample]) -> list[Verdict]:
        """Verdicts in the samples' order; a call that raises, hangs or returns nonsense scores 0 with its cause."""
        jobs = [
            {"response": s.text, "answer": s.answer, "problem": s.problem, "extra": dict(s.extra), "pieces": s.pieces}
            for s in samples
        ]
        replies = self._pool.run(jobs)
        self._report([r["error"] for r in replies if isinstance(r, dict) and "error" in r])
        return [self._verdict(r, s) for r, s in zip(replies, samples, strict=True)]

    def close(self) -> None:
        self._pool.close()

    def _report(self, errors: list[str]) -> None:
        for error in errors[:ERRORS_SHOWN]:
            log.warning("reward function %s: %s", self._name, error)
        if len(errors) > ERRORS_SHOWN:
            log.warning("reward function %s: and %d more calls failed", self._name, len(errors) - ERRORS_SHOWN)

    def _verdict(self, reply: Any, sample: Sample) -> Verdict:
        if isinstance(reply, Failed):
            return Verdict(0.0, reply.status.replace("verifier", "function"))
        if "error" in reply:
            return Verdict(0.0, reply["status"])
        found = reply["value"]
        if self._per == "response":
            value = _number(found)
            return Verdict(0.0, "function_value") if value is None else Verdict(value)
        if not isinstance(found, list) or len(found) != len(sample.pieces):
            return Verdict(0.0, "function_value")
        values = [_number(v) for v in found]
        if None in values:
            return Verdict(0.0, "function_value")
        pieces = tuple(v for v in values if v is not None)
        return Verdict(math.fsum(pieces), "ok", pieces)


def _number(value: Any) -> float | None:
    """A finite number as a float, else None."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
