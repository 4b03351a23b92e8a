"""Checkpoints into a Megatron model or pipeline stage; each rank reads only its part of the bytes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from asyppo_megatron.convert.hf_io import HFCheckpoint, check_checkpoint
from asyppo_megatron.convert.megatron_io import MegatronCheckpoint
from asyppo_megatron.convert.names import named_parameters
from asyppo_megatron.convert.shards import shard
from asyppo_megatron.convert.table import Entry, Role, entries
from asyppo_megatron.models.spec import ModelSpec

_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclass(frozen=True)
class LoadReport:
    """What a load did on this rank.

    Attributes:
        loaded: canonical names of the parameters that were filled.
        kept: those left as they were initialised (a value head that the checkpoint does not have).
        unused: Hugging Face tensors that the role does not use.
    """

    loaded: tuple[str, ...]
    kept: tuple[str, ...]
    unused: tuple[str, ...]


def stage_entries(model: nn.Module, spec: ModelSpec, role: Role, expert_offset: int = 0) -> dict[str, Entry]:
    """Canonical name -> table entry of every parameter that a model or stage holds.

    The output layer of a tied model's last stage is a copy of the embedding and has the embedding's entry.

    Raises:
        ValueError: a parameter that the table does not know.
    """
    table = entries(spec, role)
    if spec.tied and role == "actor":
        table[_OUTPUT] = table[_EMBEDDING]
    held = named_parameters(model, expert_offset)
    unknown = [n for n in held if n not in table]
    if unknown:
        raise ValueError(f"model: got parameter {unknown[0]}, which a {spec.family} {role} does not have")
    return {name: entry for name, entry in table.items() if name in held}


def _fill(name: str, parameter: torch.Tensor, part: torch.Tensor, where: str) -> None:
    if part.shape != parameter.shape:
        raise ValueError(
            f"model: {name}: got shape {tuple(parameter.shape)}, need {tuple(part.shape)} {where}; build the model "
            "from the checkpoint's config"
        )
    parameter.copy_(part)


@torch.no_grad()
def load_hf(
    model: nn.Module,
    spec: ModelSpec,
    hf_dir: str | Path,
    *,
    tp_rank: int,
    tp_size: int,
    role: Role = "actor",
    expert_offset: int = 0,
) -> LoadReport:
    """Fill a model from a Hugging Face directory; no communication.

    Embedding and output rows that only pad the vocabulary become zero; a softmax must leave them out.
    A critic takes score.weight and score.bias where the checkpoint has them (a missing bias becomes zero);
    otherwise its head stays as initialised.

    Args:
        model: GPTModel of any pipeline stage, plain or wrapped in DDP or Float16Module.
        tp_rank: this rank's place among `tp_size`.
        expert_offset: global number of this rank's first expert.

    Raises:
        ValueError: the checkpoint does not fit its config, or the model does not fit either.
    """
    checkpoint = HFCheckpoint(hf_dir)
    unused = check_checkpoint(checkpoint, spec, role)
    loaded, kept = [], []
    parameters = named_parameters(model, expert_offset)
    for name, entry in stage_entries(model, spec, role, expert_offset).items():
        if entry.hf[0][0] in checkpoint:
            part = shard(entry.kind, [checkpoint.read(n) for n, _ in entry.hf], tp_rank, tp_size, spec)
            _fill(name, parameters[name], part, f"for tp {tp_rank} of {tp_size}")
            loaded.append(name)
        else:
            if "score.weight" in checkpoint:
                parameters[name].zero_()  # a head without a bias
            kept.append(name)
    return LoadReport(tuple(loaded), tuple(kept), unused)


@torch.no_grad()
def load_megatron(
    model: nn.Module,
    spec: ModelSpec,
    directory: str | Path,
    *,
    tp_rank: int,
    tp_size: int,
    role: Role = "actor",
    prefix: str = "",
    expert_offset: int = 0,
) -> LoadReport:
    """Fill a model from a Megatron distributed checkpoint saved in any layout; no communication.

    Args:
        prefix: what the model's keys begin with in the checkpoint.
        (the others as in `load_hf`)

    Raises:
        ValueError: the checkpoint is incomplete or does not fit the model.
    """
    checkpoint = MegatronCheckpoint(directory, spec, role, prefix=prefix)
    parameters = named_parameters(model, expert_offset)
    held = stage_entries(model, spec, role, expert_offset)
    for name, entry in held.items():
        part = shard(entry.kind, checkpoint.read_hf(entry.name), tp_rank, tp_size, spec)
        _fill(name, parameters[name], part, f"for tp {tp_rank} of {tp_size}")
    return LoadReport(tuple(held), (), ())
