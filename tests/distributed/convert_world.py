"""What the ranks of test_convert.py do, and the tiny models they do it with. Not a test file."""

from __future__ import annotations

import multiprocessing
import pickle
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

LIMIT = timedelta(seconds=120)  # of a collective whose other ranks have failed
VOCAB = 131  # a prime: padded in every layout with tp > 1
HEADS = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "vocab_size": VOCAB,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Case:
    """One round trip: a checkpoint in, through a layout, out again."""

    checkpoint: str
    tp: int
    pp: int
    role: str = "actor"
    bucket_bytes: int = 20_000

    @property
    def name(self) -> str:
        return f"{self.checkpoint}-{self.role}-tp{self.tp}-pp{self.pp}"


def hf_config(family: str, tied: bool, **changes: Any) -> Any:
    """A tiny config of a family, wide enough for tp 4 and pp 4."""
    import transformers

    common = dict(
        HEADS, intermediate_size=96, max_position_embeddings=256, tie_word_embeddings=tied, initializer_range=0.08,
        eos_token_id=18, bos_token_id=1, pad_token_id=0, rms_norm_eps=1e-6,
    )  # fmt: skip
    if family == "qwen3":
        return transformers.Qwen3Config(**common, head_dim=16, **changes)
    if family == "qwen2":
        return transformers.Qwen2Config(**common, **changes)
    if family == "llama":
        return transformers.LlamaConfig(**common, rope_parameters=LLAMA3_ROPE, **changes)
    return transformers.Qwen3MoeConfig(
        **common, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True
    )


def save_hf(path: Path, family: str, *, tied: bool, dtype: torch.dtype, role: str = "actor", seed: int = 0) -> None:
    """A checkpoint with random weights, norms and biases included."""
    import transformers

    torch.manual_seed(seed)
    config = hf_config(family, tied)
    if role == "critic":
        config.num_labels = 1
        model = transformers.AutoModelForTokenClassification.from_config(config)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                p.add_(0.1 * torch.randn_like(p))
    model.to(dtype).save_pretrained(path)


def tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(7))


def hf_outputs(path: Path, role: str = "actor") -> torch.Tensor:
    """f32 [2, 12, V] logits, or values for a critic."""
    import transformers

    auto = transformers.AutoModelForTokenClassification if role == "critic" else transformers.AutoModelForCausalLM
    with torch.no_grad():
        return auto.from_pretrained(path, dtype=torch.float32)(input_ids=tokens()).logits


def _outputs(model: Any, config: Any, groups: Any, num_valid: int | None) -> torch.Tensor | None:
    """The Megatron model's outputs for `tokens()`, whole vocabulary, on ranks of the last stage; any pipeline."""
    import torch.distributed as dist

    from asyppo_megatron.packing import plan_micro_batches
    from asyppo_megatron.roles.runner import PackRunner, make_pack

    ids = tokens()
    cu_seqlens = torch.tensor([0, 12, 24], dtype=torch.int32)
    plans = plan_micro_batches(
        cu_seqlens, torch.arange(2), dp_size=1, max_tokens=64, multiple=config.tensor_model_parallel_size,
        fixed_size=groups.layout.pp > 1,
    )  # fmt: skip
    packs = [make_pack(p, ids.reshape(-1).int()) for p in plans[0]]
    outs = PackRunner(model, config, groups, 64).forward(packs, lambda out, pack: (out, pack.index))
    if not groups.is_last_stage:
        return None
    whole = None
    for out, index in outs:
        flat = out.reshape(-1, out.shape[-1])
        if num_valid is not None and groups.layout.tp > 1:
            parts = [torch.empty_like(flat) for _ in range(groups.layout.tp)]
            dist.all_gather(parts, flat.contiguous(), group=groups.collection.tp)
            flat = torch.cat(parts, -1)
        flat = flat[: len(index), :num_valid]
        whole = flat.new_zeros(24, flat.shape[-1]) if whole is None else whole
        whole[index] = flat
    return whole.view(2, 12, -1)


def round_trip(case: Case, directory: Path, registry: Any, ranks: int) -> dict[str, Any]:
    """Load, run, export; what this rank saw."""
    from asyppo_megatron.convert.export_hf import export_hf
    from asyppo_megatron.convert.load import load_hf

    source, target = directory / case.checkpoint, directory / "out" / case.name
    model, spec, groups, config = _build(case, source, registry, ranks)
    report = load_hf(model, spec, source, tp_rank=groups.at.tp, tp_size=case.tp, role=case.role)
    export_hf(model, spec, target, source, groups, role=case.role)
    outputs = None
    if spec.dtype == "float32":
        outputs = _outputs(model, config, groups, None if case.role == "critic" else spec.vocab_size)
    return {"report": report, "outputs": outputs}


def _build(case: Case, source: Path, registry: Any, ranks: int) -> tuple[Any, Any, Any, Any]:
    from asyppo_megatron.config import LayoutConfig
    from asyppo_megatron.models.gpt import build_model, transformer_config
    from asyppo_megatron.models.spec import ModelSpec
    from asyppo_megatron.parallel.layout import ParallelLayout
    from asyppo_megatron.parallel.process_groups import build_groups

    spec = ModelSpec.from_hf(source)
    groups = build_groups(ParallelLayout(tuple(range(ranks)), case.tp, case.pp), registry)
    precision = "bf16" if spec.dtype == "bfloat16" else "fp32"
    config = transformer_config(spec, LayoutConfig(tp=case.tp, pp=case.pp), precision=precision, recompute="none")
    model = build_model(spec, config, groups, value_head=case.role == "critic", trainable=False)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(7.0)
    return model, spec, groups, config


def _sharded_state(model: Any, groups: Any, prefix: str = "") -> dict[str, Any]:
    """Megatron's sharded state dict, under a prefix as in a checkpoint of several models."""
    from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding

    metadata = {"dp_cp_group": groups.collection.dp_cp, "singleton_local_shards": False}
    state = {"model": model.sharded_state_dict(metadata=metadata)}
    add_prefix_for_sharding(state, prefix)
    return state


def megatron_formats(case: Case, directory: Path, registry: Any, ranks: int) -> dict[str, Any]:
    """Load our distributed checkpoint through Megatron and through our reader, save it through Megatron."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    from asyppo_megatron.convert.export_hf import export_hf
    from asyppo_megatron.convert.load import load_megatron

    source, ours = directory / case.checkpoint, directory / "ours" / case.checkpoint
    model, spec, groups, _ = _build(case, source, registry, ranks)
    loaded = dist_checkpointing.load(_sharded_state(model, groups), str(ours))
    model.load_state_dict(loaded["model"])
    export_hf(model, spec, directory / "by-megatron" / case.name, source, groups, role=case.role)
    theirs = directory / "theirs" / case.name
    if dist.get_rank() == 0:
        theirs.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(_sharded_state(model, groups, f"{case.role}."), str(theirs))
    model, spec, groups, _ = _build(case, source, registry, ranks)
    load_megatron(model, spec, ours, tp_rank=groups.at.tp, tp_size=case.tp, role=case.role)
    export_hf(model, spec, directory / "by-reader" / case.name, source, groups, role=case.role)
    return {}


def stream(case: Case, directory: Path, registry: Any, ranks: int) -> dict[str, Any]:
    """What the weight stream yields on this rank, and what pushing versions to a directory leaves there."""
    import errno
    from unittest import mock

    from asyppo_megatron.convert.export import hf_stream
    from asyppo_megatron.convert.load import load_hf
    from asyppo_megatron.convert.safetensors_file import SafetensorsFile
    from asyppo_megatron.weight_sync.disk import PushError, push_to_directory

    source = directory / case.checkpoint
    model, spec, groups, _ = _build(case, source, registry, ranks)
    load_hf(model, spec, source, tp_rank=groups.at.tp, tp_size=case.tp)
    tp_group, found = groups.collection.tp, {}
    for everywhere in (False, True):
        options = {"tp_group": tp_group, "bucket_bytes": case.bucket_bytes, "everywhere": everywhere}
        found[everywhere] = [[(n, t.clone()) for n, t in b] for b in hf_stream(model, spec, **options)]
    target, errors = directory / "weights" / case.name, []
    for version in (1, 2):
        push_to_directory(model, spec, target, version, groups, bucket_bytes=case.bucket_bytes)
    full = OSError(errno.ENOSPC, "No space left on device")
    with mock.patch.object(SafetensorsFile, "write", side_effect=full if groups.at.pp == case.pp - 1 else None):
        try:
            push_to_directory(model, spec, target, 3, groups)
        except PushError as e:
            errors.append(str(e))
    return {"first": found[False], "everywhere": found[True], "at": groups.at, "errors": errors}


def _rank_main(rank: int, ranks: int, directory: Path, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch.distributed as dist

    try:
        torch.set_num_threads(1)
        from asyppo_megatron.backend import prepare_megatron

        dist.init_process_group(
            "gloo", init_method=f"file://{directory}/store", rank=rank, world_size=ranks, timeout=LIMIT
        )
        prepare_megatron()
        result = work(rank, ranks, directory, *args)
    except BaseException:
        result = traceback.format_exc()
    (directory / f"result-{rank}.pickle").write_bytes(pickle.dumps(result))


def all_cases(
    rank: int, ranks: int, directory: Path, work: Callable[..., dict[str, Any]], cases: list[Case]
) -> dict[str, Any]:
    """Every case in turn; a failure is that case's result."""
    from asyppo_megatron.parallel.process_groups import GroupRegistry

    registry = GroupRegistry()
    results: dict[str, Any] = {}
    for case in cases:
        try:
            results[case.name] = work(case, directory, registry, ranks)
        except Exception:  # the other ranks may wait in a collective for this one: the rest cannot run
            return {c.name: traceback.format_exc() for c in cases} | results
    return results


def run_world(ranks: int, directory: Path, work: Callable[..., Any], *args: Any, timeout_s: float = 1500) -> list[Any]:
    """Run `work(rank, ranks, directory, *args)` on gloo ranks forked from one process that has the imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "asyppo_megatron.models.gpt", "asyppo_megatron.roles.runner"])
    shutil.rmtree(directory / "store", ignore_errors=True)
    processes = [context.Process(target=_rank_main, args=(r, ranks, directory, work, args)) for r in range(ranks)]
    for p in processes:
        p.start()
    deadline = time.monotonic() + timeout_s
    for p in processes:
        p.join(max(deadline - time.monotonic(), 0))
    for p in processes:
        if p.is_alive():
            p.kill()
    results = []
    for rank in range(ranks):
        path = directory / f"result-{rank}.pickle"
        results.append(pickle.loads(path.read_bytes()) if path.exists() else "no result: killed or crashed")
    return results
