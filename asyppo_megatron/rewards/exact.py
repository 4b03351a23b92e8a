"""Exact match of a marked answer, in this process."""

from __future__ import annotations

import re
from collections.abc import Sequence

from asyppo_megatron.rewards.base import MAX_CHARACTERS, Sample, Verdict


class ExactMatch:
    """Reward 1 where group 1 of the pattern's last match equals the answer, both stripped."""

    def __init__(self, pattern: str):
        try:
            self._pattern = re.compile(pattern)
        except re.error as e:
            raise ValueError(f"reward.answer_pattern: got {pattern!r}, which is no regular expression: {e}") from e
        if self._pattern.groups < 1:
            raise ValueError(f"reward.answer_pattern: got {pattern!r}, need a group (...) around the answer")

    def score_many(self, samples: Sequence[Sample]) -> list[Verdict]:
        return [Verdict(self._score(s[0], s[1])) for s in samples]

    def close(self) -> None:
        pass

    def _score(self, text: str, answer: str) -> float:
        matches = list(self._pattern.finditer(text[-MAX_CHARACTERS:]))
        if not matches or matches[-1].group(1) is None:
            return 0.0
        return float(matches[-1].group(1).strip() == answer.strip())
