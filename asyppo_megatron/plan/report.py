"""`asyppo plan`: the tables, and the verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from asyppo_megatron.config import Config, ConfigError
from asyppo_megatron.config.model_files import read_model_file
from asyppo_megatron.models.spec import ModelSpec
from asyppo_megatron.plan.cost import Phase, part_seconds, phases, step_seconds
from asyppo_megatron.plan.hardware import (
    ACCELERATORS,
    DECODE_SHARE,
    FORWARD_SHARE,
    SYNC_SHARE,
    TRAIN_SHARE,
    Accelerator,
)
from asyppo_megatron.plan.layout import RoleDryRun, dry_run
from asyppo_megatron.plan.memory import EngineMemory, RankMemory, engine_memory, misfits, rank_memory

RESPONSE_SHARE = 0.5  # mean length of a response, of its limit, unless given


@dataclass(frozen=True)
class Plan:
    """Everything that `asyppo plan` says about one configuration."""

    name: str
    config: Config
    ranks: list[RankMemory]
    engine: EngineMemory | None
    phases: list[Phase]
    layout: list[RoleDryRun]
    misfits: list[str]
    response_tokens: float

    @property
    def peak(self) -> int:
        return max(rank.peak for rank in self.ranks)

    @property
    def total(self) -> int:
        """Peaks of all training ranks together."""
        return sum(rank.peak for rank in self.ranks)

    @property
    def seconds(self) -> float:
        """Expected time of a step."""
        in_turn = self.engine is not None and self.engine.on_training_gpus
        return step_seconds(self.phases, is_ahead=self.config.rollout.max_staleness > 0 and not in_turn)


def model_specs(config: Config) -> dict[str, ModelSpec]:
    """The architecture of every role (and of the reference), from its model file or its directory.

    Raises:
        ConfigError: neither can be read, with all roles that it concerns.
    """
    specs, errors = {}, []
    for name, role in config.roles().items():
        try:
            specs[name] = _spec(role.model, role.model_file)
        except ValueError as e:
            errors.append(f"{name}: {e}")
    if config.uses_reference and not errors:
        other = config.reference.model
        try:
            specs["reference"] = specs["actor"] if other is None else ModelSpec.from_hf(other)
        except ValueError as e:
            errors.append(f"reference: {e}")
    if errors:
        raise ConfigError(errors)
    return specs


def _spec(model: Path, file: Path | None) -> ModelSpec:
    if file is None or (model / "config.json").exists():
        return ModelSpec.from_hf(model)
    return ModelSpec.from_architecture(read_model_file(file)["architecture"], file)


def make_plan(name: str, config: Config, gpu: Accelerator, response_tokens: float | None = None) -> Plan:
    """Plan one configuration.

    Raises:
        ConfigError: a model is unknown or a layout does not fit it.
    """
    specs = model_specs(config)
    try:
        layout = dry_run(config, specs)
    except ValueError as e:
        raise ConfigError([str(e)]) from e
    mean = response_tokens or RESPONSE_SHARE * config.rollout.max_response_tokens
    return Plan(
        name,
        config,
        rank_memory(config, specs),
        engine_memory(config, specs["actor"], gpu),
        phases(config, specs, gpu, response_tokens=mean),
        layout,
        misfits(config, specs, gpu),
        mean,
    )


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def describe(plan: Plan, gpu_name: str) -> str:
    """One plan in words and tables."""
    gpu = ACCELERATORS[gpu_name]
    text = [f"{plan.name} on {gpu_name} ({gpu.memory / 1e9:.0f} GB)", "", _table(_memory_rows(plan)), ""]
    text.append(f"peak of a training rank: {_gb(plan.peak)} GB; of all {len(plan.ranks)}: {_gb(plan.total)} GB")
    if plan.engine is not None:
        e = plan.engine
        where = "on the training GPUs, in turn" if e.on_training_gpus else "on GPUs of their own"
        text.append(
            f"engines {where}: weights {_gb(e.weights)} GB, keys and values {_gb(e.cache)} GB = {e.tokens} tokens"
        )
    times = [["phase", "TFLOP", "GB moved", "s"]]
    times += [[p.name, f"{p.flops / 1e12:.0f}", f"{p.bytes / 1e9:.0f}", f"{p.seconds:.1f}"] for p in plan.phases]
    text += [
        "",
        _table(times),
        f"expected step: {plan.seconds:.0f} s at {plan.response_tokens:.0f} tokens a response",
    ]
    text += ["", *_layout_lines(plan)]
    shares = f"train {TRAIN_SHARE:.0%}, forward {FORWARD_SHARE:.0%} of {gpu.flops / 1e12:.0f} TFLOP/s"
    text.append(
        f"assumed: {shares}, decoding {DECODE_SHARE:.0%} of {gpu.bandwidth / 1e12:.2f} TB/s, "
        f"sync {SYNC_SHARE:.0%} of the link"
    )
    text += ["", "fits" if not plan.misfits else "does NOT fit:\n" + "\n".join(f"  - {m}" for m in plan.misfits)]
    return "\n".join(text)


def _memory_rows(plan: Plan) -> list[list[str]]:
    """A row a role and stage, in the order of the ranks."""
    found = [(f"{r.role}, {r.stage}", r) for rank in plan.ranks for r in rank.roles]
    counts = Counter(name for name, _ in found)
    header = "role, stage (GB a rank)|ranks|weights|gradients|optimizer|activations|logits|step|peak"
    rows = [header.split("|")]
    for name, r in dict(found).items():
        s = r.state
        parts = (s.parameters, s.gradients, s.optimizer, r.activations, r.logits, r.step, r.total)
        rows.append([name, str(counts[name]), *map(_gb, parts)])
    return rows


def _layout_lines(plan: Plan) -> list[str]:
    lines = []
    for r in plan.layout:
        p = r.layout
        groups = ", ".join(f"{len(g)} {axis} of {len(g[0])}" for axis, g in r.groups.items())
        lines.append(
            f"{r.role}: ranks {p.ranks[0]}-{p.ranks[-1]}, tp {p.tp} pp {p.pp} cp {p.cp} dp {p.dp}; groups: {groups}"
        )
        lines.append(f"    scores from ranks {_short(r.outputs)} to all {plan.config.num_ranks}")
        if r.role == "actor":
            lines += [
                f"    weights of stage {s} ({_gb(n)} GB) from rank {k} to the engines"
                for s, (k, n) in enumerate(r.senders)
            ]
    return lines


def _short(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks)) if len(ranks) <= 8 else f"{ranks[0]}, {ranks[1]}, ... {ranks[-1]} ({len(ranks)})"


def compare(plans: Sequence[Plan]) -> str:
    """Several plans beside each other, relative to the first."""
    first = plans[0]
    rows = [["", "GPUs", "peak GB a rank", "", "all ranks GB", "", "before exchange s", "step s", ""]]
    for p in plans:
        rows.append(
            [
                p.name, str(len(p.ranks)), _gb(p.peak), f"{p.peak / first.peak - 1:+.0%}", _gb(p.total),
                f"{p.total / first.total - 1:+.0%}", f"{part_seconds(p.phases, 'scores'):.1f}", f"{p.seconds:.1f}",
                f"{p.seconds - first.seconds:+.1f}",
            ]
        )  # fmt: skip
    return _table(rows)


def run_plan(configs: Sequence[tuple[str, Config]], gpu_name: str, response_tokens: float | None) -> tuple[str, bool]:
    """Text for the terminal, and whether everything fits."""
    gpu = ACCELERATORS[gpu_name]
    plans = [make_plan(name, config, gpu, response_tokens) for name, config in configs]
    parts = [describe(p, gpu_name) for p in plans]
    if len(plans) > 1:
        parts.append(compare(plans))
    return "\n\n".join(parts), not any(p.misfits for p in plans)
