"""What is read from a config.json, and what is refused with which message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from convert_configs import PUBLIC, tiny_config, write_config

from asyppo_megatron.config import LayoutConfig
from asyppo_megatron.models.spec import ModelSpec


def spec_of(path: Path, name: str) -> ModelSpec:
    return ModelSpec.from_hf(write_config(path, PUBLIC[name][0]))


def test_qwen3_fields(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, "Qwen3-14B")
    assert (spec.family, spec.num_layers, spec.hidden_size) == ("qwen3", 40, 5120)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (40, 8, 128)
    assert (spec.tied, spec.qk_layernorm, spec.qkv_bias) == (False, True, False)
    assert (spec.rope_theta, spec.rope_scaling, spec.dtype) == (1e6, None, "bfloat16")


def test_qwen2_has_biases_and_derives_its_head_size(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, "Qwen2.5-7B")
    assert (spec.qkv_bias, spec.qk_layernorm, spec.head_dim) == (True, False, 128)


def test_llama_rope_scaling_in_both_spellings(tmp_path: Path) -> None:
    old = spec_of(tmp_path / "old", "Llama-3.1-8B")
    config = dict(PUBLIC["Llama-3.1-8B"][0])
    scaling = config.pop("rope_scaling")
    config["rope_parameters"] = {**scaling, "rope_theta": config.pop("rope_theta")}
    new = ModelSpec.from_hf(write_config(tmp_path / "new", config))
    assert old == new
    assert old.rope_theta == 500000.0
    assert old.rope_scaling is not None and old.rope_scaling["factor"] == 8.0


def test_moe_fields_in_both_spellings(tmp_path: Path) -> None:
    spec = spec_of(tmp_path / "old", "Qwen3-30B-A3B")
    assert (spec.num_experts, spec.experts_per_token, spec.expert_ffn_hidden_size) == (128, 8, 768)
    assert spec.norm_topk_prob
    config = dict(PUBLIC["Qwen3-30B-A3B"][0])
    config["num_local_experts"] = config.pop("num_experts")
    assert ModelSpec.from_hf(write_config(tmp_path / "new", config)) == spec


def test_end_of_sequence_tokens_come_from_both_files(tmp_path: Path) -> None:
    write_config(tmp_path, tiny_config(eos_token_id=5))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 5]}))
    assert ModelSpec.from_hf(tmp_path).eos_token_ids == (5, 7)


def test_token_classification_is_the_same_architecture(tmp_path: Path) -> None:
    config = tiny_config(architectures=["Qwen3ForTokenClassification"])
    assert ModelSpec.from_hf(write_config(tmp_path, config)).family == "qwen3"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            r"got architecture \['GPT2LMHeadModel'\], need one of Qwen3ForCausalLM",
        ),
        ({"hidden_size": None}, "got hidden_size=None, need a positive integer"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 and num_key_value_heads 3"),
        ({"attention_bias": True}, "attention_bias: got True, need False"),
        ({"hidden_act": "gelu"}, "hidden_act: got 'gelu', need 'silu'"),
        ({"use_sliding_window": True}, "use_sliding_window: got True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope scaling: got type 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "got no low_freq_factor"),
    ],
)
def test_what_no_family_has_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    write_config(tmp_path, tiny_config(**changes))
    with pytest.raises(ValueError, match=message):
        ModelSpec.from_hf(tmp_path)


def test_missing_or_broken_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json: got No such file"):
        ModelSpec.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: got text that is not JSON"):
        ModelSpec.from_hf(tmp_path)


def test_layout_errors_name_what_does_not_divide(tmp_path: Path) -> None:
    spec = ModelSpec.from_hf(write_config(tmp_path, tiny_config()))  # 4 heads, 2 kv heads, ffn 48, 2 layers
    assert spec.layout_errors(LayoutConfig(tp=2, pp=2), "actor") == []
    errors = spec.layout_errors(LayoutConfig(tp=4, pp=3), "actor")
    assert errors == [
        "actor.layout.tp: got 4, need a divisor of the model's num_kv_heads 2; lower tp",
        "actor.layout.pp: got 3, need a divisor of the model's num_layers 2; change pp",
    ]


def test_vocabulary_is_padded_to_a_multiple_of_tp(tmp_path: Path) -> None:
    spec = ModelSpec.from_hf(write_config(tmp_path, tiny_config()))  # 37 entries
    assert [spec.padded_vocab(tp) for tp in (1, 2, 4)] == [37, 38, 40]
