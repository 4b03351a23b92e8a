"""Hugging Face -> Megatron -> Hugging Face through real models on gloo ranks: names, shapes, bytes and logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from convert_world import Case, all_cases, hf_outputs, megatron_formats, round_trip, run_world, save_hf, stream
from safetensors.torch import load_file

from asyppo_megatron.convert.megatron_io import MegatronCheckpoint
from asyppo_megatron.convert.to_hf import megatron_to_hf
from asyppo_megatron.convert.to_megatron import HFSource, Layout, hf_to_megatron
from asyppo_megatron.models.spec import ModelSpec

RANKS = 4
LAYOUTS = [(1, 1), (2, 1), (1, 2), (4, 1), (1, 4), (2, 2)]
FAMILIES = ["qwen3", "qwen2", "llama"]
CHECKPOINTS = {
    f"{family}-{'tied' if tied else 'untied'}-{dtype}": (family, tied, dtype)
    for family in FAMILIES
    for tied in (True, False)
    for dtype in ("fp32", "bf16")
}
CRITICS = {f"{family}-critic-{dtype}": (family, dtype) for family in FAMILIES for dtype in ("fp32", "bf16")}
FULL = [Case(c, tp, pp) for c in CHECKPOINTS for tp, pp in LAYOUTS]
FULL += [Case(c, tp, pp, "critic") for c in CRITICS for tp, pp in LAYOUTS]
QUICK = [
    Case("qwen3-tied-fp32", 1, 1),
    Case("qwen3-tied-fp32", 4, 1),
    Case("qwen3-tied-fp32", 1, 4),
    Case("qwen3-tied-fp32", 2, 2),
    Case("qwen3-untied-fp32", 2, 1),
    Case("qwen3-untied-fp32", 2, 2),
    Case("qwen3-critic-fp32", 2, 2, "critic"),
    Case("qwen3-critic-bf16", 4, 1, "critic"),
    Case("qwen2-tied-bf16", 2, 2),
    Case("qwen2-untied-fp32", 4, 1),
    Case("llama-tied-fp32", 2, 2),
]
FORMATS = [
    Case("qwen3-tied-fp32", 2, 2),
    Case("qwen3-untied-fp32", 4, 1),
    Case("qwen3-critic-bf16", 1, 2, "critic"),
    Case("qwen2-tied-bf16", 1, 4),
]
STREAMS = [
    Case("qwen3-tied-fp32", 2, 2),
    Case("qwen3-untied-bf16", 4, 1),
    Case("qwen2-untied-fp32", 1, 2, bucket_bytes=1),
]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CUT = 2  # tp size that our distributed checkpoints are cut for


def make_checkpoints(directory: Path, names: set[str]) -> None:
    for name in sorted(names):
        if name in CRITICS:
            family, dtype = CRITICS[name]
            save_hf(directory / name, family, tied=True, dtype=DTYPES[dtype], role="critic", seed=len(name))
        else:
            family, tied, dtype = CHECKPOINTS[name]
            save_hf(directory / name, family, tied=tied, dtype=DTYPES[dtype], seed=len(name))


def results_of(directory: Path, work: Callable, cases: list[Case]) -> dict:
    """All cases in one world; (case, rank) results by name."""
    make_checkpoints(directory, {c.checkpoint for c in cases})
    for case in cases if work is megatron_formats else []:
        source, target = directory / case.checkpoint, directory / "ours" / case.checkpoint
        hf = HFSource(source, case.role, None, None)
        hf_to_megatron(hf, source, target, role=case.role, layout=Layout(tp=CUT), force=True, quiet=True, processes=2)
    ranks = run_world(RANKS, directory, all_cases, work, cases)
    for result in ranks:
        assert isinstance(result, dict), result
    return {"directory": directory, **{c.name: [r[c.name] for r in ranks] for c in cases}}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return results_of(tmp_path_factory.mktemp("convert"), round_trip, QUICK)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return results_of(tmp_path_factory.mktemp("convert-full"), round_trip, FULL)


@pytest.fixture(scope="module")
def formats(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return results_of(tmp_path_factory.mktemp("convert-formats"), megatron_formats, FORMATS)


@pytest.fixture(scope="module")
def full_formats(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return results_of(tmp_path_factory.mktemp("convert-full-formats"), megatron_formats, FULL)


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return results_of(tmp_path_factory.mktemp("convert-streams"), stream, STREAMS)


def load_tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(directory.glob("*.safetensors")) for k, v in load_file(file).items()}


def assert_same_checkpoint(got: Path, expected: Path) -> None:
    before, after = load_tensors(expected), load_tensors(got)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and after[name].shape == tensor.shape, name
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name


def check_round_trip(case: Case, results: dict) -> None:
    for rank in results[case.name]:
        assert isinstance(rank, dict), rank
    directory = results["directory"]
    assert_same_checkpoint(directory / "out" / case.name, directory / case.checkpoint)
    if case.checkpoint.endswith("fp32"):
        expected = hf_outputs(directory / case.checkpoint, case.role)
        outputs = [r["outputs"] for r in results[case.name] if r["outputs"] is not None]
        assert outputs
        for out in outputs:
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def check_formats(case: Case, results: dict) -> None:
    for rank in results[case.name]:
        assert isinstance(rank, dict), rank
    directory = results["directory"]
    source = directory / case.checkpoint
    assert_same_checkpoint(directory / "by-megatron" / case.name, source)
    assert_same_checkpoint(directory / "by-reader" / case.name, source)
    path, spec = directory / "theirs" / case.name, ModelSpec.from_hf(source)
    with pytest.raises(ValueError, match=rf"missing; its models have the prefixes \['{case.role}\.'\]"):
        MegatronCheckpoint(path, spec, case.role)
    theirs = MegatronCheckpoint(path, spec, case.role, prefix=f"{case.role}.")
    target = directory / "back" / case.name
    megatron_to_hf(theirs, source, target, role=case.role, quiet=True, processes=2)
    assert_same_checkpoint(target, source)


@pytest.mark.parametrize("case", QUICK, ids=lambda c: c.name)
def test_round_trip_is_exact_and_logits_agree(case: Case, quick: dict) -> None:
    check_round_trip(case, quick)


@pytest.mark.parametrize("case", FORMATS, ids=lambda c: c.name)
def test_distributed_checkpoint_is_what_megatron_reads_and_writes(case: Case, formats: dict) -> None:
    check_formats(case, formats)


def assert_is_checkpoint(found: list[tuple[str, torch.Tensor]], expected: dict[str, torch.Tensor]) -> None:
    assert len(found) == len(expected) == len(dict(found))
    for name, tensor in found:
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("case", STREAMS, ids=lambda c: c.name)
def test_stream_yields_the_checkpoint_in_bounded_buckets(case: Case, streams: dict) -> None:
    expected = load_tensors(streams["directory"] / case.checkpoint)
    by_rank = streams[case.name]
    for rank in by_rank:
        assert isinstance(rank, dict), rank
    for kind, receivers in (("first", [r for r in by_rank if r["at"].tp == 0]), ("everywhere", by_rank)):
        for dp, tp in {(r["at"].dp, r["at"].tp) for r in receivers}:
            column = sorted((r for r in receivers if (r["at"].dp, r["at"].tp) == (dp, tp)), key=lambda r: r["at"].pp)
            assert_is_checkpoint([pair for r in column for b in r[kind] for pair in b], expected)
    assert not any(b for r in by_rank if r["at"].tp for b in r["first"])
    for bucket in (b for r in by_rank for b in r["first"]):
        entries = {n.replace("k_proj", "q_proj").replace("v_proj", "q_proj").replace("up_", "gate_") for n, _ in bucket}
        size = sum(t.numel() * t.itemsize for _, t in bucket)
        assert size <= case.bucket_bytes or len(entries) == 1  # a larger tensor travels alone


@pytest.mark.parametrize("case", STREAMS, ids=lambda c: c.name)
def test_pushed_weights_are_complete_and_only_the_last_version_stays(case: Case, streams: dict) -> None:
    directory = streams["directory"] / "weights" / case.name
    assert [p.name for p in directory.iterdir()] == ["v00000002"]  # 1 was replaced, 3 found the disk full
    manifest = json.loads((directory / "v00000002" / "weights.json").read_text())
    assert manifest["policy_version"] == 2 and len(manifest["files"]) == case.pp
    assert_same_checkpoint(directory / "v00000002", streams["directory"] / case.checkpoint)


@pytest.mark.parametrize("case", STREAMS, ids=lambda c: c.name)
def test_full_disk_on_one_stage_is_an_error_on_every_rank(case: Case, streams: dict) -> None:
    for rank in streams[case.name]:
        assert len(rank["errors"]) == 1
        writer = rank["at"].tp == 0 and rank["at"].dp == 0 and rank["at"].pp == case.pp - 1
        assert ("No space left" in rank["errors"][0]) == writer


@pytest.mark.slow
@pytest.mark.parametrize("case", FULL, ids=lambda c: c.name)
def test_round_trip_of_every_family_and_layout(case: Case, full: dict) -> None:
    check_round_trip(case, full)


@pytest.mark.slow
@pytest.mark.parametrize("case", FULL, ids=lambda c: c.name)
def test_distributed_checkpoint_of_every_family_and_layout(case: Case, full_formats: dict) -> None:
    check_formats(case, full_formats)
