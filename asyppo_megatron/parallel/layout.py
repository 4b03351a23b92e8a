"""Where each rank of a role stands on the parallel axes; pure arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

from asyppo_megatron.config import RoleConfig

AXES = ("tp", "cp", "dp", "pp")  # fastest first: Megatron's default order


@dataclass(frozen=True)
class Coordinates:
    tp: int
    cp: int
    dp: int
    pp: int


@dataclass(frozen=True)
class ParallelLayout:
    """A role's ranks as a box over the axes tp (fastest), cp, dp, pp (slowest).

    Attributes:
        ranks: world ranks, in order.
        tp, pp, cp: sizes; dp is what remains.
    """

    ranks: tuple[int, ...]
    tp: int = 1
    pp: int = 1
    cp: int = 1

    def __post_init__(self) -> None:
        size = self.tp * self.pp * self.cp
        if not self.ranks or len(self.ranks) % size:
            raise ValueError(
                f"layout: got tp {self.tp} x pp {self.pp} x cp {self.cp} = {size} on {len(self.ranks)} ranks, "
                "need a divisor; change the layout or the ranks"
            )

    @classmethod
    def of(cls, role: RoleConfig) -> ParallelLayout:
        return cls(role.ranks, role.layout.tp, role.layout.pp, role.layout.cp)

    @property
    def dp(self) -> int:
        return len(self.ranks) // (self.tp * self.pp * self.cp)

    def rank_at(self, at: Coordinates) -> int:
        return self.ranks[at.tp + self.tp * (at.cp + self.cp * (at.dp + self.dp * at.pp))]

    def coordinates(self, rank: int) -> Coordinates:
        index = self.ranks.index(rank)
        tp, index = index % self.tp, index // self.tp
        cp, index = index % self.cp, index // self.cp
        return Coordinates(tp, cp, index % self.dp, index // self.dp)

    def groups(self, *axes: str) -> list[tuple[int, ...]]:
        """Rank tuples that vary along `axes` and share every other coordinate; they partition the ranks.

        Within a tuple, the axis that comes first in `AXES` varies fastest.
        """
        sizes = {"tp": self.tp, "cp": self.cp, "dp": self.dp, "pp": self.pp}
        fixed = [a for a in reversed(AXES) if a not in axes]
        moving = [a for a in reversed(AXES) if a in axes]
        groups = []
        for outer in product(*(range(sizes[a]) for a in fixed)):
            base = dict(zip(fixed, outer, strict=True))
            members = [
                self.rank_at(Coordinates(**base, **dict(zip(moving, inner, strict=True))))
                for inner in product(*(range(sizes[a]) for a in moving))
            ]
            groups.append(tuple(members))
        return groups

    def embedding_groups(self) -> list[tuple[int, ...]]:
        """First and last pipeline stage of every column, which share tied embeddings; other stages alone."""
        ends: list[tuple[int, ...]] = [(g[0], g[-1]) if len(g) > 1 else (g[0],) for g in self.groups("pp")]
        return ends + [(r,) for g in self.groups("pp") for r in g[1:-1]]

    def output_ranks(self) -> list[int]:
        """For each dp index, the rank that holds the results of its forward passes (last stage, tp 0, cp 0)."""
        return [self.rank_at(Coordinates(0, 0, d, self.pp - 1)) for d in range(self.dp)]


def pack_multiples(layout: ParallelLayout, sequence_parallel: bool) -> dict[str, int]:
    """What the lengths of a pack and of its sequences must be multiples of, as `packing.plan_micro_batches` takes it.

    Context parallelism cuts every sequence into 2 cp chunks; sequence parallelism cuts what a rank then has over tp.
    """
    each = 2 * layout.cp if layout.cp > 1 else 1
    pack = layout.cp * layout.tp if sequence_parallel else 1
    return {"multiple": math.lcm(each, pack), "sequence_multiple": each}
