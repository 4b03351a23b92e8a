"""A layout on simulated ranks: groups, shards, names, and who sends what to whom. No process is started."""

from __future__ import annotations

import math
from dataclasses import dataclass

from asyppo_megatron.config import Config
from asyppo_megatron.convert.rows import Kind
from asyppo_megatron.convert.table import Role, entries
from asyppo_megatron.models.spec import ModelSpec
from asyppo_megatron.parallel.layout import AXES, ParallelLayout
from asyppo_megatron.plan.parameters import kind_of, shard_elements, stage_parameters


@dataclass(frozen=True)
class RoleDryRun:
    """What a role's layout comes to.

    Attributes:
        groups: by axis, as tuples of ranks.
        outputs: for each data-parallel index the rank that puts its scores into the exchange.
        senders: for each pipeline stage the rank that has its whole tensors after the gather, and their bytes in bf16.
    """

    role: str
    layout: ParallelLayout
    groups: dict[str, list[tuple[int, ...]]]
    outputs: list[int]
    senders: list[tuple[int, int]]


def dry_run(config: Config, specs: dict[str, ModelSpec]) -> list[RoleDryRun]:
    """Every role of a run on simulated ranks.

    Raises:
        ValueError: a layout that does not fit its model, ranks that groups miss, or tensors that no stage holds.
    """
    found = []
    for name, role in config.roles().items():
        errors = specs[name].layout_errors(role.layout, name)
        if errors:
            raise ValueError("; ".join(errors))
        layout = ParallelLayout.of(role)
        groups = {axis: layout.groups(axis) for axis in AXES}
        for axis, partition in groups.items():
            if sorted(r for g in partition for r in g) != sorted(role.ranks):
                raise ValueError(f"{name}: groups along {axis} do not cover ranks {list(role.ranks)} once each")
        places = {layout.rank_at(layout.coordinates(rank)) for rank in role.ranks}
        if places != set(role.ranks):
            raise ValueError(f"{name}: coordinates do not lead back to ranks {list(role.ranks)}")
        check_shards(specs[name], kind_of(name), layout.tp, layout.pp)
        senders = [(groups["pp"][0][s], _stage_bytes(specs[name], name, layout.pp, s)) for s in range(layout.pp)]
        found.append(RoleDryRun(name, layout, groups, layout.output_ranks(), senders))
    return found


def check_shards(spec: ModelSpec, role: Role, tp: int, pp: int) -> None:
    """Every tensor of the table on exactly one stage, and its shards as large as the whole.

    Raises:
        ValueError: naming the tensor.
    """
    table = entries(spec, role)
    held: dict[str, int] = {}
    for stage in range(pp):
        for parameter in stage_parameters(spec, role, tp=tp, pp=pp, stage=stage):
            held[parameter.name] = held.get(parameter.name, 0) + 1
    if spec.tied and role == "actor" and pp > 1:
        held.pop("output_layer.weight")  # the last stage's copy of the embedding
    for name in table.keys() ^ held.keys():
        raise ValueError(f"{name}: got on {held.get(name, 0)} stages, need one")
    for name, entry in table.items():
        whole = sum(math.prod(shape) for _, shape in entry.hf)
        together = shard_elements(entry, tp, spec) * (1 if entry.kind is Kind.REPLICATED else tp)
        padding = (spec.padded_vocab(tp) - spec.vocab_size) * spec.hidden_size if entry.kind is Kind.VOCAB else 0
        if held[name] != 1 or together != whole + padding:
            raise ValueError(f"{name}: got {together} elements on {held[name]} stage(s), need {whole + padding} on one")


def _stage_bytes(spec: ModelSpec, name: str, pp: int, stage: int) -> int:
    return 2 * sum(p.elements for p in stage_parameters(spec, kind_of(name), tp=1, pp=pp, stage=stage))
