"""What a reward takes and returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

MAX_CHARACTERS = 2000  # of a response's end; answers stand there, and a verifier's time grows with its input

Status = str
"""Why a reward is what it is: "ok", or the cause of a fallback 0 (docs/rewards.md lists them)."""


class Sample(NamedTuple):
    """One response to score.

    Attributes:
        text: of the response, without special tokens.
        answer: the reference answer; may be empty where the row has tests instead.
        problem: text of the problem.
        extra: the dataset row's other keys.
        pieces: what is scored one by one: the response's steps or its tokens, as text; () for the whole.
        ends: index of the response token that ends each piece.
        prompt_tokens: ids of the prompt.
        response_tokens: ids of the response.
    """

    text: str
    answer: str
    problem: str = ""
    extra: Mapping[str, Any] = {}
    pieces: tuple[str, ...] = ()
    ends: tuple[int, ...] = ()
    prompt_tokens: tuple[int, ...] = ()
    response_tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """Score of one response by one reward.

    Attributes:
        reward: of the whole response; the sum over the pieces where they are scored one by one.
        status: "ok", or why the reward is a fallback 0.
        pieces: score of each piece, where they are scored one by one.
    """

    reward: float
    status: Status = "ok"
    pieces: tuple[float, ...] = ()


class Verifier(Protocol):
    """Scores responses; survives whatever text they hold."""

    def score_many(self, samples: Sequence[Sample]) -> list[Verdict]:
        """Verdicts in the order of the samples."""

    def close(self) -> None:
        """End its processes."""
