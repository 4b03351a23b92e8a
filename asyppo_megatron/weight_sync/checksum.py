"""What an engine should hold after a sync, as the checksums that SGLang's weights_checker reports.

The engine hashes each of its parameters on each tp rank: the fused, sharded and padded tensor that its kernels read.
The sender makes the same tensor of what it gathered, for every tp size in use, and hashes it in the same way
(sha256 on a CPU, SGLang's own kernel on a GPU). Equal checksums prove that the engine's parameters are bit for bit
those of the trainer; what an engine derives from them (a cache, a captured graph) they do not cover.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from asyppo_megatron.convert.rows import Kind
from asyppo_megatron.convert.table import Entry
from asyppo_megatron.models.spec import ModelSpec
from asyppo_megatron.types import RunError

_VOCAB_MULTIPLE = 64  # SGLang pads a vocabulary to this
_ROTATION = 8  # a sampled sync compares about 1/8 of a model, another part each time
_SHOWN = 3
_EXPERTS = ".experts."

Checksums = dict[int, list[dict[str, str]]]  # engine tp size -> its tp rank -> parameter -> checksum


class WeightMismatch(RunError):
    """An engine does not hold what was sent."""


def engine_name(entry: Entry) -> str | None:
    """SGLang's name of the parameter that an entry's tensors make; None for experts, which it stacks."""
    name = entry.hf[0][0]
    if _EXPERTS in name:
        return None
    if entry.kind is Kind.QKV:
        return name.replace("q_proj", "qkv_proj")
    return name.replace("gate_proj", "gate_up_proj") if entry.kind is Kind.GATE_UP else name


def _engine_shards(kind: Kind, tensors: Sequence[Tensor], rank: int, tp: int, spec: ModelSpec) -> list[Tensor]:
    """Pieces that, one after the other, are an engine's parameter on one of its tp ranks."""
    if kind is Kind.REPLICATED:
        return [tensors[0]]
    if kind is Kind.ROW:
        return [tensors[0].chunk(tp, dim=1)[rank]]
    if kind is Kind.VOCAB:
        step = (
            _VOCAB_MULTIPLE
            if -(-spec.vocab_size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE % tp == 0
            else (_VOCAB_MULTIPLE * tp)
        )
        rows = -(-spec.vocab_size // step) * step // tp
        part = tensors[0][rank * rows : (rank + 1) * rows]
        return [part, part.new_zeros(rows - part.shape[0], part.shape[1])]
    if kind is not Kind.QKV:
        return [t.chunk(tp)[rank] for t in tensors]
    heads = min(tp, spec.num_kv_heads)  # with more ranks than key-value heads each head has several ranks
    own = rank * heads // tp
    return [tensors[0].chunk(tp)[rank], *(t.chunk(heads)[own] for t in tensors[1:])]


def _hash(pieces: Sequence[Tensor]) -> str:
    """As `sglang.srt.managers.mm_utils.tensor_hash` of the pieces' concatenation."""
    if pieces[0].device.type == "cuda":
        from sglang.kernels.ops.memory.gpu_tensor_hash import gpu_tensor_hash

        return f"{gpu_tensor_hash(torch.cat(list(pieces))):016x}"
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(memoryview(piece.contiguous().view(-1).view(torch.uint8).numpy()))
    return digest.digest()[:8].hex()


class Sample:
    """Which parameters a sync compares: all, or a part that rotates with the policy version.

    Args:
        mode: "full", "sampled" or "off".
    """

    def __init__(self, mode: str, spec: ModelSpec, policy_version: int):
        self.mode, self._spec = mode, spec
        self._parts = min(_ROTATION, spec.num_layers) if mode == "sampled" else 1
        self._now = policy_version % self._parts

    def __contains__(self, name: str) -> bool:
        return self.mode != "off" and not any(text in name for text in self.left_out())

    def left_out(self) -> list[str]:
        """Parts of the names that are not compared, as weights_checker's `skip_tensor_list` takes them."""
        skipped = [f".layers.{i}." for i in range(self._spec.num_layers) if i % self._parts != self._now]
        if self._now != 0:
            skipped.append("embed_tokens.")
        if self._now != self._parts - 1:
            skipped.append("lm_head.")
        return skipped + ([_EXPERTS] if self._spec.num_experts else [])


def add_checksums(
    found: Checksums,
    entries: Iterable[tuple[Entry, Sequence[Tensor]]],
    sample: Sample,
    sizes: Sequence[int],
    spec: ModelSpec,
) -> None:
    """Put what engines should report of some entries into `found`.

    Args:
        entries: with their full Hugging Face tensors, in table order.
        sizes: the engines' tp sizes.
    """
    for entry, tensors in entries:
        name = engine_name(entry)
        if name is None or name not in sample:
            continue
        for tp in sizes:
            ranks = found.setdefault(tp, [{} for _ in range(tp)])
            for rank in range(tp):
                ranks[rank][name] = _hash(_engine_shards(entry.kind, tensors, rank, tp, spec))


def merge(parts: Iterable[Mapping[Any, Sequence[Mapping[str, str]]]]) -> Checksums:
    """The stages' checksums as one; keys may have become texts on the way."""
    whole: Checksums = {}
    for part in parts:
        for tp, ranks in part.items():
            own = whole.setdefault(int(tp), [{} for _ in ranks])
            for mine, more in zip(own, ranks, strict=True):
                mine.update(more)
    return whole


def compare(url: str, policy_version: int, expected: Sequence[Mapping[str, str]], answer: Mapping[str, Any]) -> int:
    """Compare an engine's answer of weights_checker with what it should hold.

    Args:
        expected: parameter -> checksum, for each tp rank.

    Returns:
        How many parameters were compared.

    Raises:
        WeightMismatch: naming the engine and the parameters.
    """
    ranks = {r["parallelism_info"][0]["tp_rank"]: r["checksums"] for r in answer.get("ranks", [])}
    if sorted(ranks) != list(range(len(expected))):
        raise WeightMismatch(f"engine {url}: got checksums of tp ranks {sorted(ranks)}, need {len(expected)} ranks")
    wrong = [
        f"{name} (tp rank {rank})"
        for rank, own in enumerate(expected)
        for name in sorted(own.keys() | ranks[rank].keys())
        if own.get(name) != ranks[rank].get(name)
    ]
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise WeightMismatch(
            f"weight sync of policy version {policy_version}: engine {url} does not hold what was sent: "
            f"{', '.join(wrong[:_SHOWN])}{more}; stopped before it generates with these weights. Look for a faulty "
            "link or device, or an engine that was started from another model"
        )
    return sum(map(len, expected))
