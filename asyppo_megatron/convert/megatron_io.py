"""Megatron distributed checkpoints in the table's terms: canonical names, one layer's tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from asyppo_megatron.convert.names import checkpoint_keys
from asyppo_megatron.convert.raw_file import MappedFiles, Span, prefault
from asyppo_megatron.convert.rows import Kind
from asyppo_megatron.convert.safetensors_file import TensorInfo
from asyppo_megatron.convert.shards import merge, shard
from asyppo_megatron.convert.table import Entry, Role, Shape, entries
from asyppo_megatron.convert.torch_dist import Chunk, DataFile, Stored, read_chunk, read_metadata, write_metadata
from asyppo_megatron.models.spec import ModelSpec

# Modules that keep a state object beside their weights, in one layer spec or the other; always empty in fp32 and bf16.
_LAYER_STATES = (
    "self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.core_attention",
    "self_attention.q_layernorm", "self_attention.k_layernorm", "input_layernorm", "pre_mlp_layernorm",
)  # fmt: skip
_DENSE_STATES = ("mlp.linear_fc1", "mlp.linear_fc2")
_EXPERT_STATES = ("mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2")


def megatron_shape(entry: Entry, spec: ModelSpec) -> Shape:
    """Shape of a whole Megatron parameter (tp 1, no vocabulary padding)."""
    shapes = [shape for _, shape in entry.hf]
    if entry.kind in (Kind.QKV, Kind.GATE_UP):
        return (sum(s[0] for s in shapes), *shapes[0][1:])
    return shapes[0]


class MegatronCheckpoint:
    """The parameters of one model in a distributed checkpoint.

    Args:
        path: directory with `.metadata`.
        spec: the model's architecture.
        role: whose parameters they are.
        prefix: what the model's keys begin with (a training checkpoint keeps several roles, "actor.").

    Raises:
        ValueError: a parameter is missing or has another shape, or the checkpoint is incomplete.
    """

    def __init__(self, path: str | Path, spec: ModelSpec, role: Role = "actor", *, prefix: str = ""):
        self.path, self.spec, self.prefix = Path(path), spec, prefix
        self.entries = entries(spec, role)
        self._mapped = MappedFiles()
        stored = read_metadata(self.path)
        self._stored: dict[str, Stored] = {}
        self._index: dict[str, Shape] = {}
        for name in self.entries:
            self._stored[name], self._index[name] = self._find(name, stored)
        self._check_unknown(stored)
        self._chunks = {name: self._own_chunks(name) for name in self.entries}
        for name in self.entries:
            self._check(name)

    def _find(self, name: str, stored: Mapping[str, Stored]) -> tuple[Stored, Shape]:
        for key, index in checkpoint_keys(name):
            if self.prefix + key in stored:
                return stored[self.prefix + key], index
        others = sorted({k.removesuffix("embedding.word_embeddings.weight") for k in stored if "word_embeddings" in k})
        hint = f"; its models have the prefixes {others}" if others and self.prefix not in others else ""
        raise ValueError(f"{self.path}: {name}: missing{hint}; check the model's config, role and prefix")

    def _check_unknown(self, stored: Mapping[str, Stored]) -> None:
        known = {self.prefix + key for name in self.entries for key, _ in checkpoint_keys(name)}
        if self.spec.tied:
            known.add(self.prefix + "output_layer.weight")  # a last stage's own copy of the embedding
        stems = tuple(self.prefix + s for s in ("embedding.", "decoder.", "output_layer."))
        for key in sorted(stored.keys() - known):
            if key.startswith(stems):
                raise ValueError(f"{self.path}: {key}: unknown to a {self.spec.family}; check config.json and role")

    def _own_chunks(self, name: str) -> list[Chunk]:
        index = self._index[name]
        chunks = []
        for c in self._stored[name].chunks:
            inside = all(s <= i < s + n for s, n, i in zip(c.start, c.shape, index, strict=False))
            if inside:
                chunks.append(c)
        return chunks

    def _check(self, name: str) -> None:
        stored, lead = self._stored[name], len(self._index[name])
        need, got = megatron_shape(self.entries[name], self.spec), stored.shape[lead:]
        padded = self.entries[name].kind is Kind.VOCAB and got[1:] == need[1:] and got[0] >= need[0]
        if got != need and not padded:
            raise ValueError(f"{self.path}: {name}: got shape {got}, need {need}; check the model's config.json")
        held = sum(torch.Size(c.shape[lead:]).numel() for c in self._chunks[name])
        if held != torch.Size(got).numel():
            raise ValueError(f"{self.path}: {name}: got {held} of {torch.Size(got).numel()} elements; save it again")

    def info(self, name: str) -> TensorInfo:
        """Shape (vocabulary padding excluded) and dtype of a parameter."""
        return TensorInfo(megatron_shape(self.entries[name], self.spec), self._stored[name].dtype)

    def read_hf(self, name: str) -> list[Tensor]:
        """A parameter as its Hugging Face tensors; mapped where one chunk holds one. Do not write to them."""
        entry = self.entries[name]
        if entry.kind is Kind.QKV:
            return merge(entry.kind, [prefault(self._read(name, 0, None))], self.spec)
        if entry.kind is not Kind.GATE_UP:
            return merge(entry.kind, [self._read(name, 0, None)], self.spec)
        rows = entry.hf[0][1][0]
        return [self._read(name, 0, rows), self._read(name, rows, 2 * rows)]

    def span(self, tensor: Tensor) -> Span | None:
        """Where the bytes of something that was read, or of a part of it, lie; None where they were put together."""
        return self._mapped.span(tensor)

    def _read(self, name: str, first: int, last: int | None) -> Tensor:
        """Rows [first, last) of a whole parameter, put together from its chunks."""
        stored, index = self._stored[name], self._index[name]
        rest = stored.shape[len(index) :]
        last = rest[0] if last is None else last
        shape = (last - first, *rest[1:])
        whole: Tensor | None = None
        for chunk in self._chunks[name]:
            start, size = chunk.start[len(index) :], chunk.shape[len(index) :]
            if start[0] >= last or start[0] + size[0] <= first:
                continue
            part = read_chunk(self._mapped, self.path / chunk.file, chunk, stored.dtype)
            part = part[tuple(i - s for i, s in zip(index, chunk.start, strict=False))]
            part = part[max(first - start[0], 0) : last - start[0]]
            if part.shape == shape:
                return part
            whole = torch.empty(shape, dtype=stored.dtype) if whole is None else whole
            begin = (max(start[0] - first, 0), *start[1:])
            whole[tuple(slice(s, s + n) for s, n in zip(begin, part.shape, strict=True))] = part
        assert whole is not None, name  # the elements were counted
        return whole


def _leading(name: str, spec: ModelSpec) -> tuple[str, Shape, Shape]:
    """Key of a canonical name, its index in the stacked tensor, and the sizes of the stacking axes."""
    key, index = checkpoint_keys(name)[0]
    return key, index, (spec.num_layers, spec.num_experts)[: len(index)]


def write_parameter(
    file: DataFile,
    entry: Entry,
    tensors: list[Tensor],
    tp: int,
    spec: ModelSpec,
    span: Callable[[Tensor], Span | None],
) -> list[Chunk]:
    """Append a parameter made of Hugging Face tensors, cut as `tp` ranks will read it.

    Args:
        span: where the bytes of a tensor lie in a file, if they do.
    """
    key, index, _ = _leading(entry.name, spec)
    lead = (1,) * len(index)
    dim = 1 if entry.kind is Kind.ROW else 0
    if entry.kind is Kind.QKV or (entry.kind is Kind.ROW and tp > 1):
        tensors = [prefault(t) for t in tensors]  # these are rearranged, the others' bytes stay as they lie
    # Gate and up are stored one after the other, each cut by tp: Megatron's own layout of a gated layer.
    groups = [[t] for t in tensors] if entry.kind is Kind.GATE_UP else [tensors]
    kind = Kind.COLUMN if entry.kind is Kind.GATE_UP else entry.kind
    chunks: list[Chunk] = []
    at = 0
    for group in groups:
        for rank in range(1 if kind is Kind.REPLICATED else tp):
            part = shard(kind, group, rank, tp, spec)
            if kind is Kind.VOCAB:
                part = part[: max(0, spec.vocab_size - rank * part.shape[0])]
            if part.numel() == 0:
                continue
            start = [0] * part.dim()
            start[dim] = at
            at += part.shape[dim]
            chunks.append(file.add(key, (*index, *start), (*lead, *part.shape), part, span(part)))
    return chunks


def write_objects(file: DataFile, spec: ModelSpec) -> list[Chunk]:
    """Append the empty state object that Megatron's own loader asks for; all its names, of both specs, share it."""
    layers, experts = range(spec.num_layers), range(spec.num_experts)
    states = _LAYER_STATES + (() if spec.num_experts else _DENSE_STATES)
    keys = [f"decoder.layers.{s}._extra_state/shard_{i}_{spec.num_layers}" for s in states for i in layers]
    shape = f"{spec.num_layers}.{spec.num_experts}"
    for state in _EXPERT_STATES:
        keys += [f"decoder.layers.{state}._extra_state/shard_{i}.{e}_{shape}" for i in layers for e in experts]
    keys.append("decoder.final_layernorm._extra_state/shard_0_1")
    stored = file.add_object()
    return [replace(stored, key=key) for key in keys]


def write_checkpoint_metadata(
    directory: Path, spec: ModelSpec, role: Role, dtypes: Mapping[str, torch.dtype], chunks: Iterable[Chunk]
) -> None:
    """Describe data files written by `write_parameter` and `write_objects`.

    Args:
        dtypes: canonical name -> dtype.
    """
    by_key: dict[str, list[Chunk]] = {}
    objects = []
    for chunk in chunks:
        if chunk.shape:
            by_key.setdefault(chunk.key, []).append(chunk)
        else:
            objects.append(chunk)
    tensors: dict[str, Stored] = {}
    for name, entry in entries(spec, role).items():
        key, _, sizes = _leading(name, spec)
        if key in tensors:
            if tensors[key].dtype != dtypes[name]:
                raise ValueError(f"{name}: got {dtypes[name]} beside {tensors[key].dtype}, need one; use --dtype")
            continue
        shape = (*sizes, *megatron_shape(entry, spec))
        tensors[key] = Stored(shape, dtypes[name], tuple(by_key[key]))
        if spec.num_experts and key == "decoder.layers.mlp.linear_fc1.layer_norm_weight":
            # Transformer Engine's spec keeps this norm under its own name where experts follow: same bytes, two keys.
            tensors["decoder.layers.pre_mlp_layernorm.weight"] = tensors[key]
    write_metadata(directory, tensors, objects)
