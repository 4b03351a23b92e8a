"""The mapping table: hand-computed shards, exact inverses, and public models on the meta device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from convert_configs import FAMILIES, PUBLIC, tiny_config, write_config

from asyppo_megatron.convert.dry_run import check_names, check_shards, dry_run, transformers_tensors
from asyppo_megatron.convert.names import canonical, checkpoint_keys
from asyppo_megatron.convert.rows import Kind
from asyppo_megatron.convert.shards import merge, shard
from asyppo_megatron.convert.table import entries, hf_tensors
from asyppo_megatron.models.spec import ModelSpec


@pytest.fixture
def spec(tmp_path: Path) -> ModelSpec:
    """2 key-value groups of 2 queries, head size 8, hidden 32, vocabulary 37."""
    return ModelSpec.from_hf(write_config(tmp_path / "tiny", tiny_config()))


def rows(first: int, last: int) -> torch.Tensor:
    """f32 [last - first, 1]: each row holds its number."""
    return torch.arange(first, last, dtype=torch.float32)[:, None]


def test_qkv_interleaves_groups_and_gives_whole_groups_to_a_rank(spec: ModelSpec) -> None:
    q, k, v = rows(0, 32), rows(100, 116), rows(200, 216)  # 4 query heads, 2 key heads, 2 value heads, of 8 rows
    first = torch.cat([rows(0, 16), rows(100, 108), rows(200, 208)])
    second = torch.cat([rows(16, 32), rows(108, 116), rows(208, 216)])
    assert torch.equal(shard(Kind.QKV, [q, k, v], 0, 2, spec), first)
    assert torch.equal(shard(Kind.QKV, [q, k, v], 1, 2, spec), second)
    assert torch.equal(shard(Kind.QKV, [q, k, v], 0, 1, spec), torch.cat([first, second]))


def test_qkv_biases_interleave_like_weights(spec: ModelSpec) -> None:
    q, k, v = (t[:, 0] for t in (rows(0, 32), rows(100, 116), rows(200, 216)))
    expected = torch.cat([torch.arange(16, 32), torch.arange(108, 116), torch.arange(208, 216)]).float()
    assert torch.equal(shard(Kind.QKV, [q, k, v], 1, 2, spec), expected)


def test_gate_and_up_are_cut_apart(spec: ModelSpec) -> None:
    gate, up = rows(0, 4), rows(10, 14)
    assert shard(Kind.GATE_UP, [gate, up], 1, 2, spec)[:, 0].tolist() == [2, 3, 12, 13]


def test_row_cuts_columns(spec: ModelSpec) -> None:
    weight = torch.arange(8.0).view(2, 4)
    assert shard(Kind.ROW, [weight], 1, 2, spec).tolist() == [[2, 3], [6, 7]]


def test_vocabulary_padding_is_zero_and_only_at_the_end(spec: ModelSpec) -> None:
    table = rows(1, 38)
    shards = [shard(Kind.VOCAB, [table], rank, 4, spec) for rank in range(4)]
    assert [s.shape[0] for s in shards] == [10, 10, 10, 10]
    assert shards[3][:, 0].tolist() == [31, 32, 33, 34, 35, 36, 37, 0, 0, 0]
    assert torch.equal(merge(Kind.VOCAB, shards, spec)[0], table)


def test_vocabulary_padding_may_fill_whole_ranks(spec: ModelSpec) -> None:
    table = rows(1, 38)
    shards = [shard(Kind.VOCAB, [table], rank, 30, spec) for rank in range(30)]  # 2 rows each, 60 in all
    assert torch.equal(torch.cat(shards)[:37], table)
    assert not torch.cat(shards)[37:].any()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("role", ["actor", "critic"])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_inverts_shard(family: str, role: str, tp: int, dtype: torch.dtype, tmp_path: Path) -> None:
    spec = ModelSpec.from_hf(write_config(tmp_path, tiny_config(family)))
    for entry in entries(spec, role).values():
        full = [torch.randn(shape).to(dtype) for _, shape in entry.hf]
        shards = [shard(entry.kind, full, rank, tp, spec) for rank in range(tp)]
        for before, after in zip(full, merge(entry.kind, shards, spec), strict=True):
            assert torch.equal(before, after) and before.dtype == after.dtype, entry.name


def test_critic_has_a_value_head_and_no_language_head(spec: ModelSpec) -> None:
    names = hf_tensors(spec, "critic")
    assert "lm_head.weight" not in names
    assert names["score.weight"] == (1, 32) and names["score.bias"] == (1,)


def test_tied_model_has_no_language_head(tmp_path: Path) -> None:
    spec = ModelSpec.from_hf(write_config(tmp_path, tiny_config(tied=True)))
    assert "lm_head.weight" not in hf_tensors(spec)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("decoder.layers.1.pre_mlp_layernorm.weight", "decoder.layers.5.pre_mlp_layernorm.weight"),
        ("decoder.layers.1.mlp.linear_fc1.layer_norm_weight", "decoder.layers.5.pre_mlp_layernorm.weight"),
        ("decoder.layers.0.self_attention.linear_qkv.layer_norm_weight", "decoder.layers.4.input_layernorm.weight"),
        ("decoder.layers.0.self_attention.q_layernorm.weight", "decoder.layers.4.self_attention.q_layernorm.weight"),
        (
            "decoder.layers.0.mlp.experts.local_experts.1.linear_fc2.weight",
            "decoder.layers.4.mlp.experts.9.linear_fc2.weight",
        ),
        ("decoder.layers.0.mlp.experts.linear_fc1.weight3", "decoder.layers.4.mlp.experts.11.linear_fc1.weight"),
        ("output_layer.weight", "output_layer.weight"),
    ],
)  # fmt: skip
def test_names_of_both_layer_specs_and_of_stages_become_one(name: str, expected: str) -> None:
    assert canonical(name, layer_offset=4, expert_offset=8) == expected


def test_distributed_checkpoints_name_norms_as_transformer_engine_does() -> None:
    assert checkpoint_keys("decoder.layers.3.input_layernorm.weight")[0] == (
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
        (3,),
    )
    assert checkpoint_keys("decoder.layers.3.mlp.experts.7.linear_fc1.weight")[0] == (
        "decoder.layers.mlp.experts.experts.linear_fc1.weight",
        (3, 7),
    )


@pytest.mark.parametrize("name", PUBLIC)
def test_public_model_has_its_published_size(name: str, tmp_path: Path) -> None:
    config, count, _ = PUBLIC[name]
    spec = ModelSpec.from_hf(write_config(tmp_path, config))
    assert sum(torch.Size(s).numel() for s in hf_tensors(spec).values()) == count


@pytest.mark.parametrize("role", ["actor", "critic"])
@pytest.mark.parametrize(
    "name", ["Qwen3-14B", "Qwen3-32B", "Qwen3-0.6B", "Qwen2.5-7B", "Llama-3.1-8B", "Llama-3.1-70B"]
)
def test_public_model_agrees_with_transformers_on_the_meta_device(name: str, role: str, tmp_path: Path) -> None:
    config, _, tp = PUBLIC[name]
    text = dry_run(write_config(tmp_path, config), role, tp)
    assert "names and shapes agree" in text


def test_expert_model_agrees_with_transformers_on_the_meta_device(tmp_path: Path) -> None:
    config, _, tp = PUBLIC["Qwen3-30B-A3B"]
    assert "18867 Hugging Face tensors" in dry_run(write_config(tmp_path, config), "actor", tp)


def test_shards_of_a_14b_model_have_megatrons_shapes(tmp_path: Path) -> None:
    spec = ModelSpec.from_hf(write_config(tmp_path, PUBLIC["Qwen3-14B"][0]))
    shapes = check_shards(spec, "actor", 4)
    layer = "decoder.layers.39."
    assert shapes["embedding.word_embeddings.weight"] == (37984, 5120)
    assert shapes[layer + "self_attention.linear_qkv.weight"] == (7168 // 4, 5120)  # (40 + 2 * 8) * 128
    assert shapes[layer + "self_attention.linear_proj.weight"] == (5120, 1280)
    assert shapes[layer + "mlp.linear_fc1.weight"] == (2 * 17408 // 4, 5120)
    assert shapes[layer + "mlp.linear_fc2.weight"] == (5120, 4352)


def test_a_mapping_that_does_not_fit_is_named(tmp_path: Path) -> None:
    path = write_config(tmp_path, tiny_config())
    found = transformers_tensors(path, "actor")
    expected = hf_tensors(ModelSpec.from_hf(path))
    check_names(expected, found, "tiny")
    with pytest.raises(ValueError, match=r"model\.norm\.weight: the mapping has it, the model not"):
        check_names(expected, {n: s for n, s in found.items() if n != "model.norm.weight"}, "tiny")
    with pytest.raises(ValueError, match=r"model\.norm\.weight: got shape \(31,\), need \(32,\)"):
        check_names(expected, {**found, "model.norm.weight": (31,)}, "tiny")
