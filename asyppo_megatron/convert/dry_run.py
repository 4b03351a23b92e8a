"""A conversion without weights: every name and shape against the model that transformers builds from the config."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch

from asyppo_megatron.convert.shards import merge, shard
from asyppo_megatron.convert.table import Role, Shape, entries, hf_tensors
from asyppo_megatron.models.spec import ModelSpec

# transformers holds all experts of a layer in two tensors; files hold three for each expert.
_FUSED = re.compile(r"(.+\.mlp\.experts)\.(gate_up_proj|down_proj)")


def transformers_tensors(path: Path, role: Role) -> dict[str, Shape]:
    """Names and shapes in files of the model that transformers builds from `path`/config.json, on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification

    config = AutoConfig.from_pretrained(path, local_files_only=True)
    if role == "critic":
        config.num_labels = 1
    auto = AutoModelForTokenClassification if role == "critic" else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    tensors = dict(pair for name, tensor in model.state_dict().items() for pair in _in_files(name, tuple(tensor.shape)))
    if role == "actor" and config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return tensors


def _in_files(name: str, shape: Shape) -> Iterator[tuple[str, Shape]]:
    match = _FUSED.fullmatch(name)
    if match is None:
        yield name, shape
        return
    for expert in range(shape[0]):
        stem = f"{match[1]}.{expert}"
        if match[2] == "down_proj":
            yield f"{stem}.down_proj.weight", shape[1:]
        else:
            yield f"{stem}.gate_proj.weight", (shape[1] // 2, shape[2])
            yield f"{stem}.up_proj.weight", (shape[1] // 2, shape[2])


def check_names(expected: dict[str, Shape], found: dict[str, Shape], where: str) -> None:
    """Refuse a table that does not describe a model.

    Raises:
        ValueError: naming the first tensor that is missing, unknown or of another shape.
    """
    for name in sorted(expected.keys() ^ found.keys()):
        side = "the mapping has it, the model not" if name in expected else "the model has it, the mapping not"
        raise ValueError(f"{where}: {name}: {side}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(f"{where}: {name}: got shape {found[name]}, need {shape}")


def check_shards(spec: ModelSpec, role: Role, tp: int) -> dict[str, Shape]:
    """Cut every tensor for `tp` ranks and put it together again, shapes only.

    Returns:
        Canonical Megatron name -> shape of a rank's shard.
    """
    shapes: dict[str, Shape] = {}
    for entry in entries(spec, role).values():
        full = [torch.empty(shape, device="meta") for _, shape in entry.hf]
        shards = [shard(entry.kind, full, rank, tp, spec) for rank in range(tp)]
        if len({s.shape for s in shards}) != 1:
            raise ValueError(f"{entry.name}: got shards of shapes {[tuple(s.shape) for s in shards]}, need one")
        for (name, shape), tensor in zip(entry.hf, merge(entry.kind, shards, spec), strict=True):
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{entry.name}: {name}: got shape {tuple(tensor.shape)} back, need {shape}")
        shapes[entry.name] = tuple(shards[0].shape)
    return shapes


def dry_run(path: Path, role: Role, tp: int) -> str:
    """Check the mapping of a model from its config alone.

    Returns:
        What was found, in words.

    Raises:
        ValueError: the mapping and the model disagree.
    """
    spec = ModelSpec.from_hf(path)
    expected = hf_tensors(spec, role)
    check_names(expected, transformers_tensors(path, role), str(path / "config.json"))
    shapes = check_shards(spec, role, tp)
    count = sum(torch.Size(s).numel() for s in expected.values())
    return (
        f"{spec.family} {role}: {len(expected)} Hugging Face tensors, {len(shapes)} Megatron parameters, "
        f"{count / 1e9:.2f} billion elements; names and shapes agree at tp {tp}"
    )
