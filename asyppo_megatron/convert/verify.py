"""Proof that a conversion is right: every tensor compared, and for small models the logits too."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from asyppo_megatron.convert.megatron_io import MegatronCheckpoint
from asyppo_megatron.convert.pool import run_split
from asyppo_megatron.convert.progress import Progress
from asyppo_megatron.convert.table import hf_tensors
from asyppo_megatron.models.spec import ModelSpec

SMALL_MODEL_BYTES = 1 << 30  # fp32; a larger one is compared by tensors only
LOGIT_TOLERANCE = 1e-5
_PROMPTS = ((1, 2, 3, 4, 5, 6, 7, 8), (11, 7, 5, 3, 2), (9,) * 3)


class Tensors(Protocol):
    """Hugging Face tensors by name."""

    def read(self, name: str) -> Tensor: ...


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def check_tensors(
    hf: Tensors, megatron: MegatronCheckpoint, *, processes: int, quiet: bool, to_hf_dtype: torch.dtype | None = None
) -> int:
    """Compare every tensor of two checkpoints, bit by bit.

    Args:
        hf: the Hugging Face side.
        to_hf_dtype: what Megatron's tensors were converted to; None: nothing was.

    Returns:
        Number of Hugging Face tensors compared.

    Raises:
        ValueError: naming the first tensor that differs in a process.
    """
    table = list(megatron.entries.values())
    sizes = [megatron.info(e.name).num_bytes for e in table]

    def work(index: int, items: range, report: Callable[[int], None]) -> int:
        count = 0
        for i in items:
            for (name, _), tensor in zip(table[i].hf, megatron.read_hf(table[i].name), strict=True):
                if not _same(tensor.to(to_hf_dtype or tensor.dtype), hf.read(name)):
                    raise ValueError(f"verify: {name}: differs from {table[i].name}; do not use the result")
                count += 1
            report(sizes[i])
        return count

    return sum(run_split(work, sizes, processes=processes, progress=Progress("verify", sum(sizes), quiet=quiet)))


def has_comparable_logits(spec: ModelSpec) -> bool:
    """Whether both models fit into memory side by side for a look at their logits, and run here."""
    from asyppo_megatron.backend import prepare_megatron

    prepare_megatron()
    from asyppo_megatron.models.gpt import can_run

    elements = sum(torch.Size(s).numel() for s in hf_tensors(spec).values())
    return 4 * elements <= SMALL_MODEL_BYTES and can_run(spec)


def check_logits(hf_dir: Path, megatron_dir: Path, spec: ModelSpec, *, critic: bool, prefix: str = "") -> float:
    """Largest difference of logits (values for a critic) between both models on a few prompts, in fp32.

    Raises:
        ValueError: the difference exceeds 1e-5 (of the largest logit where that is above 1).
    """
    worst, scale = 0.0, 1.0
    reference = _hf_model(hf_dir, critic)
    model = _MegatronModel(megatron_dir, spec, critic, prefix)
    with torch.no_grad():
        for prompt in _PROMPTS:
            ids = torch.tensor([[t % spec.vocab_size for t in prompt]])
            expected = reference(input_ids=ids).logits[0].float()
            worst = max(worst, (model.outputs(ids) - expected).abs().max().item())
            scale = max(scale, expected.abs().max().item())
    limit = LOGIT_TOLERANCE * scale
    if not worst <= limit:
        raise ValueError(f"verify: got logits that differ by {worst:.2e}, need {limit:.2e}; do not use the result")
    return worst


def _hf_model(path: Path, critic: bool) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    auto = AutoModelForTokenClassification if critic else AutoModelForCausalLM
    return auto.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()


class _MegatronModel:
    """A whole model on one CPU or GPU process, loaded from a distributed checkpoint."""

    def __init__(self, path: Path, spec: ModelSpec, critic: bool, prefix: str):
        import torch.distributed as dist

        from asyppo_megatron.backend import prepare_megatron
        from asyppo_megatron.config import LayoutConfig
        from asyppo_megatron.convert.load import load_megatron
        from asyppo_megatron.models.gpt import build_model, transformer_config
        from asyppo_megatron.parallel.layout import ParallelLayout
        from asyppo_megatron.parallel.process_groups import GroupRegistry, build_groups

        if not dist.is_initialized():  # a converter is a process of its own: nobody else will want a group
            alone = dist.HashStore()
            dist.init_process_group("gloo", store=alone, rank=0, world_size=1, timeout=timedelta(minutes=1))
        prepare_megatron()
        groups = build_groups(ParallelLayout((dist.get_rank(),)), GroupRegistry())
        assert groups is not None
        config = transformer_config(spec, LayoutConfig(), precision="fp32", recompute="none")
        self.model = build_model(spec, config, groups, value_head=critic, trainable=False)
        role = "critic" if critic else "actor"
        load_megatron(self.model, spec, path, tp_rank=0, tp_size=1, role=role, prefix=prefix)

    def outputs(self, ids: Tensor) -> Tensor:
        """f32 [T, V] logits, or [T, 1] values, of one prompt i64 [1, T]."""
        from asyppo_megatron.models.attention import packed_seq_params

        device = next(self.model.parameters()).device
        length = ids.numel()
        params = packed_seq_params(torch.tensor([0, length], dtype=torch.int32, device=device), length, length)
        out = self.model(input_ids=ids.to(device), position_ids=None, attention_mask=None, packed_seq_params=params)
        return out.float().cpu().view(length, -1)
