"""Which groups of responses make a step's batch, and what a long response costs (DAPO, arXiv 2503.14476).

A group whose responses all have the same reward has no advantage and so no gradient: with `drop_equal_groups` it is
dropped and another problem drawn in its place, until the batch is full or the rounds are used up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from asyppo_megatron.config import FilteringConfig


@dataclass(frozen=True)
class FilterCounts:
    """What filtering did, in a step or in a run.

    Attributes:
        rounds: of generation.
        drawn_groups: generated.
        dropped_groups: left out because their rewards were equal.
        filled_groups: of equal rewards, but in the batch all the same, since the rounds were used up.
    """

    rounds: int = 0
    drawn_groups: int = 0
    dropped_groups: int = 0
    filled_groups: int = 0

    def __add__(self, other: FilterCounts) -> FilterCounts:
        return FilterCounts(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


class GroupCollector:
    """Decides round by round how many groups a batch still needs; holds indices and counts, no responses.

    Args:
        wanted: groups of the batch.
        config: with `drop_equal_groups` off, the first round is the batch.
    """

    def __init__(self, wanted: int, config: FilteringConfig):
        self._wanted, self._config = wanted, config
        self._kept: list[int] = []
        self._equal: list[int] = []
        self._rounds = 0

    @property
    def missing(self) -> int:
        """Groups to generate in the next round; 0 when the batch is full or no round is left."""
        if self._rounds == (self._config.max_rounds if self._config.drop_equal_groups else 1):
            return 0
        return self._wanted - len(self._kept)

    def add(self, rewards: Sequence[Sequence[float]]) -> None:
        """Take in a round.

        Args:
            rewards: of the responses of each of the `missing` groups, before any penalty.
        """
        if len(rewards) != self.missing:
            raise ValueError(f"round of groups: got {len(rewards)}, need {self.missing}")
        first = len(self._kept) + len(self._equal)
        for index, group in enumerate(rewards, first):
            informative = not self._config.drop_equal_groups or max(group) > min(group)
            (self._kept if informative else self._equal).append(index)
        self._rounds += 1

    def chosen(self) -> list[int]:
        """The groups of the batch in the order in which they were drawn, numbered over all rounds.

        Where too few differ, the batch keeps its size with the first of those that do not.
        """
        return sorted([*self._kept, *self._equal[: self._wanted - len(self._kept)]])

    def counts(self) -> FilterCounts:
        filled = self._wanted - len(self._kept)
        drawn = len(self._kept) + len(self._equal)
        return FilterCounts(self._rounds, drawn, len(self._equal) - filled, filled)


def overlong_penalty(length: int, max_tokens: int, config: FilteringConfig) -> float:
    """DAPO's soft penalty on length (Eq. 13), to be added to the reward.

    With a buffer of B = floor(overlong_fraction x max_tokens) tokens: 0 up to max_tokens - B, then falling linearly to
    -overlong_penalty at max_tokens.

    Args:
        length: of the response, tokens.
        max_tokens: the longest that a response can be, tokens.
    """
    buffer = int(config.overlong_fraction * max_tokens + 1e-9)
    over = length - (max_tokens - buffer)
    if buffer == 0 or over <= 0:
        return 0.0
    return -config.overlong_penalty * min(over / buffer, 1.0)
