"""Generation and verification side by side: what a rollout step and an evaluation have in common."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from asyppo_megatron.rewards import Verdict, Verifier
from asyppo_megatron.rollout.engine import Completion, Engine, GenerationRequest
from asyppo_megatron.rollout.tokenizer import decode

VERIFY_AT_ONCE = 64  # responses handed to the verifier together


@dataclass(frozen=True)
class Scored:
    """One response with its text and its verdict."""

    completion: Completion
    text: str
    verdict: Verdict


@dataclass(frozen=True)
class ScoredResponses:
    """Responses in the order of their requests, and what they took.

    Attributes:
        responses: one a request.
        generate_s: wall-clock seconds until the last response was generated.
        verify_s: seconds the verifier worked, for the most part beside generation.
    """

    responses: list[Scored]
    generate_s: float
    verify_s: float


class Scorer:
    """An engine, a tokenizer and a verifier that work together; responses are verified while others are generated."""

    def __init__(self, engine: Engine, tokenizer: Any, verifier: Verifier):
        self._engine, self._tokenizer, self._verifier = engine, tokenizer, verifier
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="verify")

    def run(self, requests: Sequence[GenerationRequest], answers: Sequence[str]) -> ScoredResponses:
        """Generate and verify.

        Args:
            requests: numbered 0..n-1 by `index`.
            answers: reference answer of each request.
        """
        start = time.monotonic()
        pending: list[Completion] = []
        futures: list[Future[tuple[list[Scored], float]]] = []
        for completion in self._engine.generate(requests):
            pending.append(completion)
            if len(pending) == VERIFY_AT_ONCE:
                futures.append(self._thread.submit(self._verify, pending, answers))
                pending = []
        generate_s = time.monotonic() - start
        if pending:
            futures.append(self._thread.submit(self._verify, pending, answers))
        done = [f.result() for f in futures]
        scored = {s.completion.index: s for chunk, _ in done for s in chunk}
        missing = [r.index for r in requests if r.index not in scored]
        if missing:
            raise RuntimeError(f"engine: got no completion of requests {missing[:10]}, need one of each")
        return ScoredResponses([scored[r.index] for r in requests], generate_s, sum(seconds for _, seconds in done))

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._verifier.close()
        self._engine.close()

    def _verify(self, completions: Sequence[Completion], answers: Sequence[str]) -> tuple[list[Scored], float]:
        start = time.monotonic()
        texts = [decode(self._tokenizer, c.tokens) for c in completions]
        verdicts = self._verifier.score_many([(t, answers[c.index]) for c, t in zip(completions, texts, strict=True)])
        scored = [Scored(*row) for row in zip(completions, texts, verdicts, strict=True)]
        return scored, time.monotonic() - start


def stable_seed(*parts: object) -> int:
    """A 63-bit seed that depends on the parts alone, the same in every process and Python."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
