"""The vocabulary of the mapping table: what a row says, and the rows that all families share."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """How a Megatron parameter is made of Hugging Face tensors, and how tensor parallelism cuts it."""

    REPLICATED = "replicated"  # the same on every rank
    COLUMN = "column"  # cut along dim 0
    ROW = "row"  # cut along dim 1
    VOCAB = "vocab"  # cut along dim 0 after padding with zero rows to a multiple of tp
    QKV = "qkv"  # per key-value group: its queries, its key, its value; whole groups go to a rank
    GATE_UP = "gate_up"  # each rank holds its cut of gate, then its cut of up


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        megatron: canonical Megatron name; `{layer}` and `{expert}` count over the whole model.
        kind: how the tensors combine.
        hf: Hugging Face names in the order that `kind` expects.
        dims: symbolic shape of each of `hf`, in `table.dims`' names.
    """

    megatron: str
    kind: Kind
    hf: tuple[str, ...]
    dims: tuple[tuple[str, ...], ...]


def row(megatron: str, kind: Kind, *tensors: str) -> Row:
    """A row from texts such as "model.norm.weight: hidden"."""
    parts = [text.split(": ") for text in tensors]
    return Row(megatron, kind, tuple(p[0] for p in parts), tuple(tuple(p[1].split()) for p in parts))


_M, _H = "decoder.layers.{layer}.", "model.layers.{layer}."

EMBEDDING = row("embedding.word_embeddings.weight", Kind.VOCAB, "model.embed_tokens.weight: vocab hidden")
FINAL_NORM = row("decoder.final_layernorm.weight", Kind.REPLICATED, "model.norm.weight: hidden")
OUTPUT = row("output_layer.weight", Kind.VOCAB, "lm_head.weight: vocab hidden")
VALUE_HEAD = (
    row("output_layer.weight", Kind.REPLICATED, "score.weight: one hidden"),
    row("output_layer.bias", Kind.REPLICATED, "score.bias: one"),
)

NORMS = (
    row(_M + "input_layernorm.weight", Kind.REPLICATED, _H + "input_layernorm.weight: hidden"),
    row(_M + "pre_mlp_layernorm.weight", Kind.REPLICATED, _H + "post_attention_layernorm.weight: hidden"),
)
ATTENTION = (
    row(
        _M + "self_attention.linear_qkv.weight",
        Kind.QKV,
        _H + "self_attn.q_proj.weight: q hidden",
        _H + "self_attn.k_proj.weight: kv hidden",
        _H + "self_attn.v_proj.weight: kv hidden",
    ),
    row(_M + "self_attention.linear_proj.weight", Kind.ROW, _H + "self_attn.o_proj.weight: hidden q"),
)
QKV_BIAS = (
    row(
        _M + "self_attention.linear_qkv.bias",
        Kind.QKV,
        _H + "self_attn.q_proj.bias: q",
        _H + "self_attn.k_proj.bias: kv",
        _H + "self_attn.v_proj.bias: kv",
    ),
)
QK_NORM = (
    row(_M + "self_attention.q_layernorm.weight", Kind.REPLICATED, _H + "self_attn.q_norm.weight: head"),
    row(_M + "self_attention.k_layernorm.weight", Kind.REPLICATED, _H + "self_attn.k_norm.weight: head"),
)
MLP = (
    row(
        _M + "mlp.linear_fc1.weight",
        Kind.GATE_UP,
        _H + "mlp.gate_proj.weight: ffn hidden",
        _H + "mlp.up_proj.weight: ffn hidden",
    ),
    row(_M + "mlp.linear_fc2.weight", Kind.ROW, _H + "mlp.down_proj.weight: hidden ffn"),
)
EXPERTS = (
    row(_M + "mlp.router.weight", Kind.REPLICATED, _H + "mlp.gate.weight: experts hidden"),
    row(
        _M + "mlp.experts.{expert}.linear_fc1.weight",
        Kind.GATE_UP,
        _H + "mlp.experts.{expert}.gate_proj.weight: expert_ffn hidden",
        _H + "mlp.experts.{expert}.up_proj.weight: expert_ffn hidden",
    ),
    row(
        _M + "mlp.experts.{expert}.linear_fc2.weight",
        Kind.ROW,
        _H + "mlp.experts.{expert}.down_proj.weight: hidden expert_ffn",
    ),
)
