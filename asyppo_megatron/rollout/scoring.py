"""Generation and verification side by side: what a rollout step and an evaluation have in common."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from asyppo_megatron.rewards import Judgement, RewardSet, Sample
from asyppo_megatron.rollout.dataset import Problem
from asyppo_megatron.rollout.engine import Completion, Engine, GenerationRequest
from asyppo_megatron.rollout.tokenizer import decode

VERIFY_AT_ONCE = 64  # responses handed to the verifier together


@dataclass(frozen=True)
class Scored:
    """One response with its text and what its rewards came to."""

    completion: Completion
    text: str
    verdict: Judgement


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
    """An engine, a tokenizer and rewards that work together; responses are scored while others are generated."""

    def __init__(self, engine: Engine, tokenizer: Any, rewards: RewardSet):
        self._engine, self._tokenizer, self._rewards = engine, tokenizer, rewards
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="verify")

    def run(self, requests: Sequence[GenerationRequest], problems: Sequence[Problem]) -> ScoredResponses:
        """Generate and score.

        Args:
            requests: numbered 0..n-1 by `index`.
            problems: of each request.
        """
        start = time.monotonic()
        pending: list[Completion] = []
        futures: list[Future[tuple[list[Scored], float]]] = []
        for completion in self._engine.generate(requests):
            pending.append(completion)
            if len(pending) == VERIFY_AT_ONCE:
                futures.append(self._thread.submit(self._verify, pending, problems))
                pending = []
        generate_s = time.monotonic() - start
        if pending:
            futures.append(self._thread.submit(self._verify, pending, problems))
        done = [f.result() for f in futures]
        scored = {s.completion.index: s for chunk, _ in done for s in chunk}
        missing = [r.index for r in requests if r.index not in scored]
        if missing:
            raise RuntimeError(f"engine: got no completion of requests {missing[:10]}, need one of each")
        return ScoredResponses([scored[r.index] for r in requests], generate_s, sum(seconds for _, seconds in done))

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._rewards.close()
        self._engine.close()

    def _verify(self, completions: Sequence[Completion], problems: Sequence[Problem]) -> tuple[list[Scored], float]:
        start = time.monotonic()
        scored = score_completions(
            completions, [problems[c.index] for c in completions], self._tokenizer, self._rewards
        )
        return scored, time.monotonic() - start


def score_completions(
    completions: Sequence[Completion], problems: Sequence[Problem], tokenizer: Any, rewards: RewardSet
) -> list[Scored]:
    """Text and judgement of each completion of the problem beside it; blocks until all are there."""
    texts = [decode(tokenizer, c.tokens) for c in completions]
    samples = [
        Sample(
            text=text,
            answer=problem.answer,
            problem=problem.text,
            extra=problem.extra,
            prompt_tokens=tuple(problem.prompt_tokens.tolist()),
            response_tokens=tuple(completion.tokens.tolist()),
        )
        for text, problem, completion in zip(texts, problems, completions, strict=True)
    ]
    judgements = rewards.judge(samples, [p.rewards for p in problems])
    return [Scored(*row) for row in zip(completions, texts, judgements, strict=True)]


def stable_seed(*parts: object) -> int:
    """A 63-bit seed that depends on the parts alone, the same in every process and Python."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
