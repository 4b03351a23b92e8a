"""What a verifier takes and returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

MAX_CHARACTERS = 2000  # of a response's end; answers stand there, and a verifier's time grows with its input

Status = Literal["ok", "verifier_error", "verifier_timeout"]


@dataclass(frozen=True)
class Verdict:
    """Score of one response.

    Attributes:
        reward: 1.0 correct, 0.0 wrong or not verifiable.
        status: "ok", or why the reward is a fallback 0.
    """

    reward: float
    status: Status = "ok"


class Verifier(Protocol):
    """Scores responses; survives whatever text they hold."""

    def score_many(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Verdicts of (response text, reference answer) pairs, in their order."""

    def close(self) -> None:
        """End its processes."""
