"""Buckets of full tensors from real shards, what they cost in memory, and roles that leave their device."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_world import Case, _build, all_cases, run_world, save_hf
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from asyppo_megatron.convert.shards import Kind, merge, parts, shard, spans
from asyppo_megatron.models.spec import ModelSpec
from asyppo_megatron.weight_sync.buckets import plan_buckets

RANKS = 4
BUCKET = 40_000
CASES = [
    Case("qwen3-tied-fp32", 2, 2, bucket_bytes=BUCKET),
    Case("qwen3-untied-bf16", 4, 1, bucket_bytes=BUCKET),
    Case("qwen2-untied-fp32", 1, 2, bucket_bytes=BUCKET),
    Case("llama-tied-fp32", 1, 4, bucket_bytes=1),
]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations make while it is active, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.is_counting = True
        self._known: set[int] = set()

    def ignore(self, tensors: Any) -> None:
        self._known |= {t.untyped_storage()._cdata for t in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or not self.is_counting:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def buckets(case: Case, directory: Path, registry: Any, ranks: int) -> dict[str, Any]:
    """What the stream yields on this rank at the second push, and the most that lived at once for both."""
    from asyppo_megatron.convert.load import load_hf
    from asyppo_megatron.weight_sync.buckets import BucketStream, KeptBuffers

    source = directory / case.checkpoint
    model, spec, groups, _ = _build(case, source, registry, ranks)
    load_hf(model, spec, source, tp_rank=groups.at.tp, tp_size=case.tp)

    def allocate(size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8)

    live = LiveBytes()
    live.ignore(model.parameters())
    kept, places = KeptBuffers(allocate), []
    with live:
        for _ in range(2):
            found = []
            kept.release()
            stream = BucketStream(
                model, spec, tp_group=groups.collection.tp, dtype=None, bucket_bytes=case.bucket_bytes, allocate=kept
            )
            places.append([b.data_ptr() for b in stream.buffers])
            for bucket in stream:
                if bucket is not None:
                    live.is_counting = False  # the test's own copies
                    found += [(n, t.clone()) for n, t in bucket.named_tensors()]
                    bucket.flat.fill_(255)  # the next push has to write all of it
                    live.is_counting = True
    assert places[0] == places[1], "the second push took other memory"
    largest = max(p.num_bytes + p.work_bytes for p in stream.plans)
    return {"found": found, "at": groups.at, "peak": live.peak, "largest": largest, "plans": len(stream.plans)}


def offload(rank: int, ranks: int, directory: Path) -> dict[str, Any]:
    """Two equal roles train; one leaves its device between the steps."""
    from asyppo_megatron.config import LayoutConfig, OptimizerConfig, RoleConfig
    from asyppo_megatron.convert.load import load_hf
    from asyppo_megatron.parallel.layout import ParallelLayout
    from asyppo_megatron.parallel.process_groups import GroupRegistry, build_groups
    from asyppo_megatron.roles.offload import PARTS, Offloader
    from asyppo_megatron.roles.role import Role

    registry, roles, results = GroupRegistry(), {}, {}
    for precision in ("fp32", "bf16"):
        for name in ("stays", "moves"):
            groups = build_groups(ParallelLayout((0, 1), tp=1), registry)  # dp 2: the optimizer is sharded
            config = RoleConfig(
                model=directory / "model", ranks=(0, 1), layout=LayoutConfig(), precision=precision,
                optimizer=OptimizerConfig(lr=1e-2),
            )  # fmt: skip
            spec = ModelSpec.from_hf(directory / "model")
            role = Role(name, config, spec, groups, value_head=False, total_updates=4)
            load_hf(role.module, spec, directory / "model", tp_rank=0, tp_size=1)
            role.weights_changed()
            roles[name] = role
        mover = Offloader(roles["moves"].module, roles["moves"].ddp, roles["moves"].optimizer)
        freed = back = 0
        for step in range(3):
            for name, role in roles.items():
                role.ddp.zero_grad_buffer()
                generator = torch.Generator().manual_seed(step)
                for p in role.module.parameters():
                    p.main_grad.copy_(torch.randn(p.shape, generator=generator))
                role.step()
                if name == "moves":
                    freed = mover.offload(PARTS)
                    held = sum(p.untyped_storage().nbytes() for p in role.module.parameters())
                    assert held == 0 and mover.away == set(PARTS) and mover.offload(PARTS) == 0
                    back = mover.reload()
        pairs = zip(roles["stays"].module.parameters(), roles["moves"].module.parameters(), strict=True)
        states = [[v for s in _states(r) for v in s] for r in roles.values()]
        results[precision] = {
            "weights": all(torch.equal(a, b) for a, b in pairs),
            "states": len(states[0]) > 0 and all(torch.equal(a, b) for a, b in zip(*states, strict=True)),
            "freed": freed,
            "back": back,
            "model": sum(p.numel() * p.itemsize for p in roles["moves"].module.parameters()),
        }
    return results


def _states(role: Any) -> list[list[torch.Tensor]]:
    from asyppo_megatron.backend.adamw_state import torch_optimizers

    return [
        [v for v in inner.state[p].values() if isinstance(v, torch.Tensor)]
        for inner in torch_optimizers(role.optimizer)
        for group in inner.param_groups
        for p in group["params"]
    ]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("stream")
    for case in CASES:
        family, tied, dtype = case.checkpoint.split("-")
        torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        save_hf(directory / case.checkpoint, family, tied=tied == "tied", dtype=torch_dtype)
    ranks = run_world(RANKS, directory, all_cases, buckets, CASES)
    assert all(isinstance(r, dict) for r in ranks), ranks
    return {"directory": directory} | {c.name: [r[c.name] for r in ranks] for c in CASES}


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_buckets_hold_the_checkpoint_once_on_the_senders(case: Case, results: dict[str, Any]) -> None:
    expected = {
        k: v for f in (results["directory"] / case.checkpoint).glob("*.safetensors") for k, v in load_file(f).items()
    }
    ranks = results[case.name]
    assert all(isinstance(r, dict) for r in ranks), ranks
    senders = sorted((r for r in ranks if r["at"].tp == 0 and r["at"].dp == 0), key=lambda r: r["at"].pp)
    found = [pair for r in senders for pair in r["found"]]
    assert len(found) == len(expected)
    for name, tensor in found:
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
    assert not any(r["found"] for r in ranks if r["at"].tp)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_no_rank_holds_more_than_its_shard_and_two_buckets(case: Case, results: dict[str, Any]) -> None:
    for rank in results[case.name]:
        assert rank["plans"] > 1 and rank["largest"] > 0
        assert rank["peak"] <= 2 * rank["largest"], (rank["at"], rank["peak"], rank["largest"])


def test_a_plan_keeps_to_its_size_and_its_order_but_what_is_too_large_comes_last() -> None:
    from asyppo_megatron.convert.table import Entry

    def entry(name: str, kind: Kind, *shape: int) -> Entry:
        return Entry(name, kind, ((name, shape),))

    entries = [entry("a", Kind.COLUMN, 8, 4), entry("b", Kind.ROW, 8, 4), entry("c", Kind.REPLICATED, 4),
               entry("large", Kind.VOCAB, 100, 4), entry("d", Kind.REPLICATED, 4)]  # fmt: skip
    dtypes = [torch.float32] * 4 + [torch.bfloat16]
    plans = plan_buckets(entries, dtypes, bucket_bytes=300, tp=2)
    # a: 128 bytes. b: 128 and 64 to receive what is cut along columns, so it would pass 300 with a.
    assert [[s.name for s in p.slots] for p in plans] == [["a"], ["b", "c"], ["d"], ["large"]]
    assert [(p.num_bytes, p.work_bytes) for p in plans] == [(128, 0), (144, 64), (8, 0), (1600, 0)]
    assert [s.offset for s in plans[1].slots] == [0, 128]


@pytest.mark.parametrize("kind", list(Kind))
def test_parts_laid_into_their_spans_are_the_merged_tensors(kind: Kind, results: dict[str, Any]) -> None:
    spec = ModelSpec.from_hf(results["directory"] / "qwen3-tied-fp32")  # 131 rows of vocabulary: padded
    q, kv, hidden = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim, spec.hidden_size
    shapes = {
        Kind.VOCAB: [(spec.vocab_size, hidden)],
        Kind.QKV: [(q, hidden), (kv, hidden), (kv, hidden)],
        Kind.GATE_UP: [(96, hidden), (96, hidden)],
    }.get(kind, [(hidden, 96)])
    full = [torch.randn(s) for s in shapes]
    for tp in (1, 2, 4):
        shards = [shard(kind, full, rank, tp, spec) for rank in range(tp)]
        laid = [torch.full(s, float("nan")) for s in shapes]
        for rank in range(tp):
            own = parts(kind, shards[rank], rank, tp, spec)
            for span, part in zip(spans(kind, shapes, rank, tp, spec), own, strict=True):
                target = laid[span.tensor].narrow(span.dim, span.start, span.length)
                target.copy_(part.reshape(target.shape))
        assert all(torch.equal(a, b) for a, b in zip(laid, merge(kind, shards, spec), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(laid, full, strict=True))


def test_a_role_that_left_its_device_trains_on_as_if_it_had_stayed(tmp_path: Path) -> None:
    save_hf(tmp_path / "model", "qwen3", tied=False, dtype=torch.float32)
    for rank in run_world(2, tmp_path, offload):
        assert isinstance(rank, dict), rank
        for precision, result in rank.items():
            assert result["weights"] and result["states"], (precision, result)
            assert result["freed"] == result["back"] >= 4 * result["model"] / 2, (precision, result)
