"""What is checked about files before any process is started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from asyppo_megatron.config import Config, ConfigError, build_config
from asyppo_megatron.convert.safetensors_file import SafetensorsFile, TensorInfo
from asyppo_megatron.convert.table import hf_tensors
from asyppo_megatron.models.spec import ModelSpec
from asyppo_megatron.preflight import check_run


def make_model(path: Path, *, weights: bool = True, tokenizer: bool = True, **changes: Any) -> Path:
    """A directory that looks like a Hugging Face Qwen3."""
    path.mkdir()
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 64,
        "vocab_size": 100,
        "max_position_embeddings": 64,
    }
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    if weights:
        spec = ModelSpec.from_hf(path)
        tensors = {n: TensorInfo(s, torch.float32) for n, s in hf_tensors(spec).items()}
        SafetensorsFile(path / "model.safetensors", tensors).close()  # zeros
    if tokenizer:
        (path / "tokenizer.json").touch()
    return path


@pytest.fixture
def tree(tmp_path) -> dict[str, Any]:
    """A run whose files are all there."""
    row = json.dumps({"id": "a", "problem": "1+1", "answer": "2"}) + "\n"
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl").write_text(row)
    make_model(tmp_path / "actor")
    make_model(tmp_path / "critic", tokenizer=False)
    return {
        "actor": {"model": str(tmp_path / "actor"), "ranks": "0-1", "layout": {"tp": 2}},
        "critics": [{"model": str(tmp_path / "critic"), "ranks": r} for r in (2, 3)],
        "rollout": {"max_prompt_tokens": 32, "max_response_tokens": 32},
        "data": {
            "train": str(tmp_path / "train.jsonl"),
            "eval": [{"name": "e", "path": str(tmp_path / "eval.jsonl")}],
        },
    }


def errors_of(tree: dict[str, Any]) -> list[str]:
    config: Config = build_config(tree)
    with pytest.raises(ConfigError) as caught:
        check_run(config)
    return caught.value.errors


def test_a_run_with_all_its_files_passes(tree):
    check_run(build_config(tree))


def test_the_layout_must_divide_the_model(tree):
    tree["actor"].update(ranks="0-7", layout={"tp": 4})
    for i, critic in enumerate(tree["critics"]):
        critic["ranks"] = i
    assert errors_of(tree) == ["actor.layout.tp: got 4, need a divisor of the model's num_kv_heads 2; lower tp"]
    tree["actor"].update(ranks="0-3", layout={"pp": 4})
    assert errors_of(tree) == ["actor.layout.pp: got 4, need a divisor of the model's num_layers 2; change pp"]


def test_missing_files_are_all_named_at_once(tree, tmp_path):
    tree["actor"]["model"] = "/nowhere"
    tree["critics"][1]["model"] = str(make_model(tmp_path / "empty", weights=False))
    tree["data"]["train"] = str(tmp_path / "none.jsonl")
    tree["data"]["eval"][0]["path"] = str(tmp_path)
    tree["reward"] = {"kind": "exact", "answer_pattern": "no group"}
    assert errors_of(tree) == [
        "actor.model: /nowhere/config.json: got No such file or directory, need a readable file; point at a Hugging "
        "Face model directory",
        f"critics.1.model: {tmp_path / 'empty'} has no *.safetensors file; convert the checkpoint first",
        f"data.train: {tmp_path / 'none.jsonl'} does not exist",
        f"data.eval e: {tmp_path} does not exist",
        "reward.answer_pattern: got 'no group', need a group (...) around the answer",
        "data.tokenizer: /nowhere has no tokenizer.json or tokenizer_config.json",
    ]


def test_damaged_weights_are_named_by_file_and_tensor(tree, tmp_path):
    actor, critic = tmp_path / "actor/model.safetensors", tmp_path / "critic"
    size = actor.stat().st_size
    os.truncate(actor, size - 1)
    config = json.loads((critic / "config.json").read_text())
    (critic / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    first, *others = errors_of(tree)
    assert first.startswith(f"actor.model: {actor}: ") and f"got a file of {size - 1} bytes, need {size}" in first
    wrong = f"{critic / 'model.safetensors'}: model.layers.0.mlp.gate_proj.weight: got shape (64, 32), need (48, 32)"
    assert others == [f"critics.{m}.model: {wrong}" for m in (0, 1)]


def test_a_mixture_of_experts_is_not_trained(tree, tmp_path):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    tree["actor"]["model"] = str(make_model(tmp_path / "moe", architectures=["Qwen3MoeForCausalLM"], **experts))
    assert errors_of(tree) == ["actor.model: got a mixture of experts, need a dense model; those are only converted"]


def test_wrong_rows_are_named_by_set_file_and_line(tree, tmp_path):
    train, evaluation = tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
    with train.open("a") as file:
        file.write('{"id": "b", "problem": "1"}\n{not json\n')
    evaluation.write_text("")
    first, second, third = errors_of(tree)
    assert first == f"data.train: {train}:2: answer: missing"
    assert second.startswith(f"data.train: {train}:3: is not JSON: ")
    assert third == f"data.eval e: {evaluation}: got no problems, need lines of {{id, problem, answer}}"


def test_kernels_where_they_cannot_run_are_refused(tree, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    tree["kernels"] = "triton"
    (error,) = errors_of(tree)
    assert error.startswith("kernels") and "set kernels to" in error


def test_the_longest_sequence_must_fit_every_model(tree, tmp_path):
    tree["critics"][0]["model"] = str(make_model(tmp_path / "short", max_position_embeddings=48))
    assert errors_of(tree) == [
        "critics.0.model: got 48 positions, need 64 for rollout.max_prompt_tokens + max_response_tokens; lower them "
        "or choose another model"
    ]


def test_a_critic_must_know_the_actors_vocabulary(tree, tmp_path):
    tree["critics"][0]["model"] = str(make_model(tmp_path / "small", vocab_size=50))
    assert errors_of(tree) == [
        "critics.0.model: got a vocabulary of 50, need at least the actor's 100; it reads the actor's tokens"
    ]


def test_a_reference_model_is_checked_like_the_actor(tree, tmp_path):
    tree["ppo"] = {"kl": {"coef": 0.1}}
    tree["reference"] = {"model": "/nowhere"}
    (error,) = errors_of(tree)
    assert error.startswith("reference.model: /nowhere/config.json: got No such file or directory")


def test_checking_needs_neither_torch_nor_megatron():
    code = "import asyppo_megatron.preflight, asyppo_megatron.cli, sys; print({'torch', 'megatron'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
