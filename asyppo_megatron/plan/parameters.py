"""Parameters, gradients and optimizer state of one rank, to the byte: from the mapping table's shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from asyppo_megatron.config import RoleConfig
from asyppo_megatron.convert.rows import Kind
from asyppo_megatron.convert.table import Entry, Role, entries
from asyppo_megatron.models.spec import ModelSpec

# Megatron's order of a layer's parameters: it decides which data-parallel rank holds which part of the state.
_ORDER = (
    "input_layernorm", "self_attention.linear_proj", "self_attention.linear_qkv.weight",
    "self_attention.linear_qkv.bias", "self_attention.q_layernorm", "self_attention.k_layernorm", "pre_mlp_layernorm",
    "mlp.linear_fc1", "mlp.linear_fc2",
)  # fmt: skip
_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
_ALIGNED, _BUCKET = 64, 128  # elements: where a parameter begins in the gradient buffer, and what a bucket divides by


@dataclass(frozen=True)
class Parameter:
    """A parameter as one rank holds it.

    Attributes:
        elements: of this rank's shard, vocabulary padding included.
        alone: it has a bucket of its own in the gradient buffer (an embedding shared by two stages).
    """

    name: str
    elements: int
    alone: bool = False


@dataclass(frozen=True)
class StateBytes:
    """Bytes of one model on one rank."""

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer


def kind_of(name: str) -> Role:
    """Which kind of model a role has, by its name."""
    return "critic" if name.startswith("critic") else "actor"


def shard_elements(entry: Entry, tp: int, spec: ModelSpec) -> int:
    """Elements of one tensor-parallel rank's shard."""
    total = sum(math.prod(shape) for _, shape in entry.hf)
    if entry.kind is Kind.REPLICATED:
        return total
    if entry.kind is Kind.VOCAB:
        return spec.padded_vocab(tp) // tp * entry.hf[0][1][1]
    return total // tp


def stage_parameters(spec: ModelSpec, role: Role, *, tp: int, pp: int, stage: int) -> list[Parameter]:
    """Parameters of a pipeline stage's rank, in Megatron's order."""
    table = entries(spec, role)
    per_stage = spec.num_layers // pp
    layers = range(stage * per_stage, (stage + 1) * per_stage)
    shared = spec.tied and role == "actor" and pp > 1
    last = stage == pp - 1

    def held(name: str, alone: bool = False) -> Parameter:
        return Parameter(name, shard_elements(table[name], tp, spec), alone)

    found = [held(_EMBEDDING, shared)] if stage == 0 else []
    for layer in layers:
        stems = [f"decoder.layers.{layer}.{part}" for part in _ORDER]
        found += [held(n) for stem in stems for n in (stem, f"{stem}.weight") if n in table]
    if last:
        found.append(held("decoder.final_layernorm.weight"))
        if _OUTPUT in table:
            found += [held(n) for n in (_OUTPUT, "output_layer.bias") if n in table]
        elif shared:
            found.append(Parameter(_OUTPUT, held(_EMBEDDING).elements, alone=True))
    return found


def model_elements(spec: ModelSpec, role: Role = "actor") -> int:
    """Elements of the whole model."""
    return sum(p.elements for p in stage_parameters(spec, role, tp=1, pp=1, stage=0))


def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def buckets(parameters: Sequence[Parameter], dp: int) -> list[tuple[int, list[tuple[int, int]]]]:
    """Megatron's gradient buffer under a distributed optimizer.

    Returns:
        For each bucket its size, padding included, and (begin, end) of its parameters in it; elements.
    """
    found: list[tuple[int, list[tuple[int, int]]]] = []
    spans: list[tuple[int, int]] = []

    def close() -> None:
        nonlocal spans
        if spans:
            found.append((_padded(spans[-1][1], math.lcm(dp, _BUCKET)), spans))
            spans = []

    for parameter in reversed(parameters):
        if parameter.alone:
            close()
        begin = _padded(spans[-1][1], _ALIGNED) if spans else 0
        spans.append((begin, begin + parameter.elements))
        if parameter.alone:
            close()
    close()
    return found


def owned_elements(parameters: Sequence[Parameter], dp: int) -> list[int]:
    """For each data-parallel rank, the elements whose optimizer state it keeps."""
    owned = [0] * dp
    for size, spans in buckets(parameters, dp):
        part = size // dp
        for begin, end in spans:
            for rank in range(begin // part, -(-end // part)):
                owned[rank] += min(end, (rank + 1) * part) - max(begin, rank * part)
    return owned


def state_bytes(
    spec: ModelSpec, role: Role, config: RoleConfig, stage: int, *, trains: bool = True
) -> list[StateBytes]:
    """What each data-parallel rank of a stage keeps for a model; context-parallel ranks count as data-parallel ones.

    Weights in the role's precision; gradients in fp32; two fp32 moments, and in bf16 fp32 weights, of the elements that
    the rank owns. Left out: the step counters of torch's AdamW, 4 bytes a tensor.
    """
    layout = config.layout
    held = stage_parameters(spec, role, tp=layout.tp, pp=layout.pp, stage=stage)
    shards = config.dp * layout.cp
    plain = sum(p.elements for p in held)
    width, per_owned = (2, 12) if config.precision == "bf16" else (4, 8)
    if not trains:
        return [StateBytes(plain * width, 0, 0)] * shards
    if not config.optimizer.distributed:
        return [StateBytes(plain * width, plain * 4, plain * per_owned)] * shards
    buffer = sum(size for size, _ in buckets(held, shards))
    return [StateBytes(buffer * width, buffer * 4, own * per_owned) for own in owned_elements(held, shards)]
