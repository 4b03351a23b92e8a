"""Exact match of a marked answer, in this process."""

from __future__ import annotations

from collections.abc import Sequence

import regex

from asyppo_megatron.rewards.base import MAX_CHARACTERS, Sample, Verdict


class ExactMatch:
    """Reward 1 where group 1 of the pattern's last match equals the answer, both stripped.

    Args:
        pattern: regular expression with a group around the answer.
        timeout_s: of one response: the time of some patterns grows exponentially with a text made for it.
    """

    def __init__(self, pattern: str, timeout_s: float):
        self._timeout_s = timeout_s
        try:
            self._pattern = regex.compile(pattern)
        except regex.error as e:
            raise ValueError(f"reward.answer_pattern: got {pattern!r}, which is no regular expression: {e}") from e
        if self._pattern.groups < 1:
            raise ValueError(f"reward.answer_pattern: got {pattern!r}, need a group (...) around the answer")

    def score_many(self, samples: Sequence[Sample]) -> list[Verdict]:
        return [self._score(s[0], s[1]) for s in samples]

    def close(self) -> None:
        pass

    def _score(self, text: str, answer: str) -> Verdict:
        try:
            matches = list(self._pattern.finditer(text[-MAX_CHARACTERS:], timeout=self._timeout_s))
        except TimeoutError:
            return Verdict(0.0, "verifier_timeout")
        found = matches[-1].group(1) if matches else None
        return Verdict(float(found is not None and found.strip() == answer.strip()))
