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


def kept_groups(rewards: Sequence[Sequence[float] | None], wanted: int, config: FilteringConfig) -> list[bool]:
    """Which of the groups in line take a place in a batch; it depends on the line's order alone.

    Once (max_rounds - 1) x wanted groups have been dropped for a batch, its other places go to the groups that come,
    whatever their rewards.

    Args:
        rewards: of the responses of each group, before any penalty; None for a group that is not finished, which
            counts as kept.
        wanted: groups of a batch.
        config: with `drop_equal_groups` off, every group is kept.
    """
    most = (config.max_rounds - 1) * wanted if config.drop_equal_groups else 0
    found: list[bool] = []
    kept = dropped = 0  # of the batch under way
    for group in rewards:
        drop = group is not None and dropped < most and is_equal(group)
        found.append(not drop)
        kept, dropped = kept + (not drop), dropped + drop
        if kept == wanted:
            kept = dropped = 0
    return found


def is_equal(rewards: Sequence[float]) -> bool:
    """Whether a group's rewards say nothing about which response is better."""
    return max(rewards) == min(rewards)


def count_groups(rewards: Sequence[Sequence[float]], kept: Sequence[bool], rounds: int) -> FilterCounts:
    """What filtering did to the groups of a batch and those dropped between them."""
    filled = sum(k and is_equal(r) for r, k in zip(rewards, kept, strict=True))
    return FilterCounts(rounds, len(kept), len(kept) - sum(kept), filled)


def filter_statistics(counts: FilterCounts, total: FilterCounts) -> dict[str, float]:
    """What a step's metrics say: of its batch, and of the run so far."""
    of_step = {f"filter/{name}": value for name, value in asdict(counts).items()}
    return of_step | {"filter/dropped_groups_total": total.dropped_groups}


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
