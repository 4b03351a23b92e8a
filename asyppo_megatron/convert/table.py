"""The one mapping between Hugging Face tensors and Megatron parameters, for every family.

Converters, the checkpoint loader and the weight-sync stream all read it here; there is no second path.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from asyppo_megatron.convert import llama, qwen2, qwen3, qwen3_moe
from asyppo_megatron.convert.rows import EMBEDDING, FINAL_NORM, OUTPUT, VALUE_HEAD, Kind, Row
from asyppo_megatron.models.spec import ModelSpec

Role = Literal["actor", "critic"]
Shape = tuple[int, ...]

LAYERS: dict[str, tuple[Row, ...]] = {
    "qwen3": qwen3.LAYER,
    "qwen2": qwen2.LAYER,
    "llama": llama.LAYER,
    "qwen3_moe": qwen3_moe.LAYER,
}


@dataclass(frozen=True)
class Entry:
    """A row of the table for one layer and expert of one model.

    Attributes:
        name: canonical Megatron name.
        kind: how the Hugging Face tensors combine.
        hf: their names and full shapes, in the order that `kind` expects.
    """

    name: str
    kind: Kind
    hf: tuple[tuple[str, Shape], ...]


def dims(spec: ModelSpec) -> dict[str, int]:
    """The sizes that the table's symbols stand for."""
    return {
        "one": 1,
        "vocab": spec.vocab_size,
        "hidden": spec.hidden_size,
        "head": spec.head_dim,
        "q": spec.num_heads * spec.head_dim,
        "kv": spec.num_kv_heads * spec.head_dim,
        "ffn": spec.ffn_hidden_size,
        "experts": spec.num_experts,
        "expert_ffn": spec.expert_ffn_hidden_size,
    }


def _rows(spec: ModelSpec, role: Role) -> Iterator[tuple[Row, int, int]]:
    """Rows with their layer and expert, in the order of every file and stream."""
    yield EMBEDDING, 0, 0
    layer_rows = LAYERS[spec.family]
    plain = [r for r in layer_rows if "{expert}" not in r.megatron]
    expert_rows = [r for r in layer_rows if "{expert}" in r.megatron]
    for layer in range(spec.num_layers):
        yield from ((r, layer, 0) for r in plain)
        yield from ((r, layer, e) for e in range(spec.num_experts) for r in expert_rows)
    yield FINAL_NORM, 0, 0
    if role == "critic":
        yield from ((r, 0, 0) for r in VALUE_HEAD)
    elif not spec.tied:
        yield OUTPUT, 0, 0


def entries(spec: ModelSpec, role: Role = "actor") -> dict[str, Entry]:
    """Canonical Megatron name -> entry, in the order of every file and stream."""
    size = dims(spec)
    table = {}
    for r, layer, expert in _rows(spec, role):
        name = r.megatron.format(layer=layer, expert=expert)
        hf = (n.format(layer=layer, expert=expert) for n in r.hf)
        shapes = (tuple(size[s] for s in symbols) for symbols in r.dims)
        table[name] = Entry(name, r.kind, tuple(zip(hf, shapes, strict=True)))
    return table


def hf_tensors(spec: ModelSpec, role: Role = "actor") -> dict[str, Shape]:
    """Name -> shape of every tensor that a Hugging Face checkpoint of this model holds, in file order."""
    return {name: shape for entry in entries(spec, role).values() for name, shape in entry.hf}
