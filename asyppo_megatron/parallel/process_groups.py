"""Process groups of every role, made once, in the same order on every rank; no `parallel_state`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from .layout import Coordinates, ParallelLayout


class GroupRegistry:
    """One torch group for each distinct tuple of ranks, whichever roles and axes ask for it.

    Every rank of the world must ask for the same tuples in the same order, members or not: making a group is
    a collective of the world.

    Args:
        timeout_s: of every collective in these groups. Without it torch takes its own default, not the world's.
    """

    def __init__(self, timeout_s: float = 1800.0) -> None:
        self._groups: dict[tuple[int, ...], Any] = {}
        self._timeout = timedelta(seconds=timeout_s)

    def get(self, ranks: tuple[int, ...], name: str = "group") -> Any:
        """The group of `ranks`, or None on a rank outside it.

        Args:
            name: what an error calls the group; of those who share it, the first decides.
        """
        if ranks not in self._groups:
            whole = ranks == tuple(range(dist.get_world_size()))
            text = f"{name} of ranks {', '.join(map(str, ranks))}"
            self._groups[ranks] = (
                dist.group.WORLD if whole else dist.new_group(list(ranks), timeout=self._timeout, group_desc=text)
            )
        return self._groups[ranks] if dist.get_rank() in ranks else None

    def mine(self, partition: list[tuple[int, ...]], name: str = "group") -> Any:
        """Make every group of a partition; return the one this rank is in, or None."""
        groups = [self.get(ranks, name) for ranks in partition]
        return next((g for g in groups if g is not None), None)

    def __len__(self) -> int:
        return len(self._groups)


@dataclass(frozen=True)
class RoleGroups:
    """A role's groups as seen from one member rank.

    Attributes:
        layout: the role's layout.
        at: this rank's coordinates.
        collection: groups by axis, as Megatron-Core takes them.
        role: group of all ranks of the role.
    """

    layout: ParallelLayout
    at: Coordinates
    collection: ProcessGroupCollection
    role: Any

    @property
    def is_first_stage(self) -> bool:
        return self.at.pp == 0

    @property
    def is_last_stage(self) -> bool:
        return self.at.pp == self.layout.pp - 1

    @property
    def is_output(self) -> bool:
        """Whether this rank holds the results of its dp index's forward passes."""
        return self.is_last_stage and self.at.tp == 0 and self.at.cp == 0

    @property
    def is_lead(self) -> bool:
        """The one rank that speaks for the role: holds outputs, dp index 0."""
        return self.is_output and self.at.dp == 0


def build_groups(layout: ParallelLayout, registry: GroupRegistry, name: str = "role") -> RoleGroups | None:
    """All groups of one role. Called by every rank of the world, role after role in one fixed order.

    Args:
        name: of the role; groups are called `<role>.<axis>` in errors.

    Returns:
        None on ranks outside the role.
    """
    axes = {
        "tp": ("tp",),
        "cp": ("cp",),
        "pp": ("pp",),
        "dp": ("dp",),
        "dp_cp": ("dp", "cp"),
        "tp_cp": ("tp", "cp"),
        "mp": ("tp", "pp"),
        "tp_dp_cp": ("tp", "dp", "cp"),
    }
    made = {axis: registry.mine(layout.groups(*names), f"{name}.{axis}") for axis, names in axes.items()}
    made["embd"] = registry.mine(layout.embedding_groups(), f"{name}.embd")
    role = registry.get(layout.ranks, name)
    single = registry.mine([(r,) for r in layout.ranks], f"{name}.self")
    rank = dist.get_rank()
    if rank not in layout.ranks:
        return None
    # Filled in full: what is missing Megatron creates by itself or reads from `parallel_state`.
    collection = ProcessGroupCollection(**made)
    collection.pos_embd = single
    collection.intra_dist_opt = role
    collection.ep = collection.expt_tp = single
    collection.tp_ep, collection.tp_ep_pp, collection.expt_dp = made["tp"], made["mp"], made["dp_cp"]
    collection.intra_dp_cp, collection.intra_expt_dp = made["dp_cp"], made["dp_cp"]
    collection.inter_dist_opt = collection.hcp = None
    return RoleGroups(layout, layout.coordinates(rank), collection, role)
