"""Hugging Face checkpoints in and out: single or sharded safetensors, in bounded memory."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from asyppo_megatron.convert.raw_file import MappedFiles, Span
from asyppo_megatron.convert.safetensors_file import Place, TensorInfo, read_header
from asyppo_megatron.convert.table import Role, Shape, hf_tensors
from asyppo_megatron.models.spec import ModelSpec

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
MAX_FILE_BYTES = 5 << 30
_SIDECARS = re.compile(
    r"generation_config\.json|tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\.json|merges\.txt"
    r"|chat_template\..*|LICENSE.*|USE_POLICY.*"
)
_NO_WEIGHT = re.compile(r".*rotary_emb\.inv_freq")
_SHOWN = 5


class HFCheckpoint:
    """The tensors of a Hugging Face directory, mapped lazily.

    Every header is read and checked when the object is made; tensors are views of the mapped files, so only the
    pages that are used are read. They must not be written to.

    Raises:
        ValueError: no safetensors, a missing shard, a truncated file, an index that does not match its files.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._places: dict[str, Place] = {}
        self._file_of: dict[str, Path] = {}
        self._mapped = MappedFiles()
        index = self.path / INDEX
        weight_map = _read_index(index) if index.exists() else None
        for file in self._files(weight_map):
            for name, place in read_header(file).items():
                self._places[name], self._file_of[name] = place, file
        if weight_map is not None:
            self._check_index(weight_map)

    def _files(self, weight_map: dict[str, str] | None) -> list[Path]:
        if weight_map is None:
            if not (self.path / SINGLE).exists():
                raise ValueError(f"{self.path}: got neither {SINGLE} nor {INDEX}, need a safetensors checkpoint")
            return [self.path / SINGLE]
        files = [self.path / name for name in dict.fromkeys(weight_map.values())]
        for file in files:
            if not file.exists():
                first = next(n for n, f in weight_map.items() if f == file.name)
                raise ValueError(f"{file}: missing, but {INDEX} puts {first} there; fetch the shard")
        return files

    def _check_index(self, weight_map: dict[str, str]) -> None:
        for name, file in weight_map.items():
            if self._file_of.get(name) != self.path / file:
                raise ValueError(f"{self.path / file}: {name}: not in this file, but {INDEX} says so; fetch both again")
        extra = self._places.keys() - weight_map.keys()
        for name in sorted(extra):
            raise ValueError(f"{self._file_of[name]}: {name}: in this file, but not in {INDEX}; fetch both again")

    @property
    def names(self) -> list[str]:
        return list(self._places)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def info(self, name: str) -> TensorInfo:
        return self._places[name].info

    def shape(self, name: str) -> Shape:
        return self._places[name].info.shape

    def file(self, name: str) -> Path:
        return self._file_of[name]

    def read(self, name: str) -> Tensor:
        """The tensor, mapped from its file: slicing it reads only the slice. Do not write to it."""
        place = self._places[name]
        return self._mapped[self._file_of[name]].tensor(place.offset, place.info.dtype, place.info.shape)

    def span(self, tensor: Tensor) -> Span | None:
        """Where the bytes of something that was read, or of a part of it, lie; None where they were changed."""
        return self._mapped.span(tensor)

    def close(self) -> None:
        """Drop the mappings; tensors that are still held stay valid."""
        self._mapped.close()


def _read_index(path: Path) -> dict[str, str]:
    try:
        return dict(json.loads(path.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path}: got no weight_map ({e!r}), need the index of a sharded checkpoint") from e


def _list(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def check_checkpoint(checkpoint: HFCheckpoint, spec: ModelSpec, role: Role) -> tuple[str, ...]:
    """Names and shapes of a checkpoint against its config, before anything is read or built.

    An actor wants its language head (unless tied); a critic ignores it and takes a value head where there is one.

    Returns:
        Tensors that the role does not use.

    Raises:
        ValueError: tensors missing, unknown or of the wrong shape, or a config that lies about tying.
    """
    need = hf_tensors(spec, role)
    optional = {n for n in need if n.startswith("score.")}
    missing = [n for n in need if n not in checkpoint and n not in optional]
    if missing == ["lm_head.weight"]:
        raise ValueError(
            f"{checkpoint.path}: lm_head.weight: missing, but config.json has tie_word_embeddings false; set it to "
            "true if the model is tied, or fetch the checkpoint again"
        )
    if missing:
        raise ValueError(f"{checkpoint.path}: missing tensor(s) {_list(missing)}; fetch the checkpoint again")
    unused = tuple(n for n in checkpoint.names if n not in need)
    droppable = {"lm_head.weight"} if role == "critic" or spec.tied else set()
    unknown = [n for n in unused if n not in droppable and not _NO_WEIGHT.fullmatch(n)]
    if unknown:
        raise ValueError(
            f"{checkpoint.file(unknown[0])}: unknown tensor(s) {_list(unknown)} for a {spec.family} {role}; "
            "check the architecture in config.json"
        )
    for name, shape in need.items():
        if name in checkpoint and checkpoint.shape(name) != shape:
            raise ValueError(f"{checkpoint.file(name)}: {name}: got shape {checkpoint.shape(name)}, need {shape}")
    if spec.tied and role == "actor" and "lm_head.weight" in unused:
        _check_tied(checkpoint)
    return unused


def _check_tied(checkpoint: HFCheckpoint) -> None:
    head, embedding = (checkpoint.read(n) for n in ("lm_head.weight", "model.embed_tokens.weight"))
    if head.shape != embedding.shape or not torch.equal(head, embedding):
        raise ValueError(
            f"{checkpoint.file('lm_head.weight')}: lm_head.weight: differs from model.embed_tokens.weight, but "
            "config.json has tie_word_embeddings true; set it to false"
        )


def write_sidecars(source: Path, target: Path, role: Role, dtype: torch.dtype) -> None:
    """Carry config, tokenizer and generation config along; a critic's config names its own architecture."""
    for file in sorted(source.iterdir()):
        if file.is_file() and _SIDECARS.fullmatch(file.name):
            shutil.copyfile(file, target / file.name)
    config = json.loads((source / "config.json").read_text())
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
    if role == "critic":
        family = re.sub(r"For[A-Z]\w+$", "", config["architectures"][0])
        config.update(architectures=[f"{family}ForTokenClassification"])
        config.update(num_labels=1, id2label={"0": "value"}, label2id={"value": 0})
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def plan_files(tensors: Mapping[str, TensorInfo], max_file_bytes: int = MAX_FILE_BYTES) -> list[dict[str, TensorInfo]]:
    """Tensors in order, filled into files up to a size (a larger tensor has a file of its own)."""
    files: list[dict[str, TensorInfo]] = []
    room = 0
    for name, info in tensors.items():
        if not files or info.num_bytes > room:
            files.append({})
            room = max_file_bytes
        files[-1][name] = info
        room -= info.num_bytes
    return files


def file_name(index: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def write_index(directory: Path, files: Mapping[str, Mapping[str, TensorInfo]]) -> None:
    """The index of a sharded checkpoint; a single file needs none."""
    if list(files) == [SINGLE]:
        return
    size = sum(info.num_bytes for tensors in files.values() for info in tensors.values())
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
