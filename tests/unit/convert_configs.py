"""config.json of public models, as their authors publish them (what matters to a mapping), and tiny checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from asyppo_megatron.convert.hf_io import file_name, plan_files, write_index
from asyppo_megatron.convert.safetensors_file import TensorInfo
from asyppo_megatron.convert.table import Role, hf_tensors
from asyppo_megatron.models.spec import ModelSpec

_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128, "num_key_value_heads": 8,
    "vocab_size": 151936, "rope_theta": 1000000, "rms_norm_eps": 1e-06, "max_position_embeddings": 40960,
    "attention_bias": False, "hidden_act": "silu", "eos_token_id": 151645, "torch_dtype": "bfloat16",
}  # fmt: skip
_QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rope_theta": 1000000.0, "rms_norm_eps": 1e-06,
    "hidden_act": "silu", "use_sliding_window": False, "sliding_window": 131072, "max_position_embeddings": 131072,
    "eos_token_id": 151643, "torch_dtype": "bfloat16",
}  # fmt: skip
_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_key_value_heads": 8, "vocab_size": 128256,
    "rope_theta": 500000.0, "rms_norm_eps": 1e-05, "max_position_embeddings": 131072, "attention_bias": False,
    "mlp_bias": False, "hidden_act": "silu", "eos_token_id": [128001, 128008, 128009], "torch_dtype": "bfloat16",
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}  # fmt: skip


def _sizes(hidden: int, ffn: int, layers: int, heads: int, tied: bool) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
        "tie_word_embeddings": tied,
    }  # fmt: skip


_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_key_value_heads": 4, "num_experts": 128,
    "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True, "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}  # fmt: skip

# name -> (config, number of parameters as published, a tp size that divides the model)
PUBLIC: dict[str, tuple[dict[str, Any], int, int]] = {
    "Qwen3-0.6B": ({**_QWEN3, **_sizes(1024, 3072, 28, 16, True)}, 596_049_920, 8),
    "Qwen3-1.7B": ({**_QWEN3, **_sizes(2048, 6144, 28, 16, True)}, 1_720_574_976, 8),
    "Qwen3-4B": ({**_QWEN3, **_sizes(2560, 9728, 36, 32, True)}, 4_022_468_096, 8),
    "Qwen3-8B": ({**_QWEN3, **_sizes(4096, 12288, 36, 32, False)}, 8_190_735_360, 8),
    "Qwen3-14B": ({**_QWEN3, **_sizes(5120, 17408, 40, 40, False)}, 14_768_307_200, 8),
    "Qwen3-32B": ({**_QWEN3, **_sizes(5120, 25600, 64, 64, False)}, 32_762_123_264, 8),
    "Qwen3-30B-A3B": ({**_QWEN3, **_MOE, **_sizes(2048, 6144, 48, 32, False)}, 30_532_122_624, 4),
    "Qwen2.5-1.5B": (
        {**_QWEN2, **_sizes(1536, 8960, 28, 12, True), "num_key_value_heads": 2, "vocab_size": 151936},
        1_543_714_304, 2,
    ),
    "Qwen2.5-7B": (
        {**_QWEN2, **_sizes(3584, 18944, 28, 28, False), "num_key_value_heads": 4, "vocab_size": 152064},
        7_615_616_512, 4,
    ),
    "Llama-3.2-1B": (
        {**_LLAMA, **_sizes(2048, 8192, 16, 32, True), "head_dim": 64,
         "rope_scaling": {**_LLAMA["rope_scaling"], "factor": 32.0}}, 1_235_814_400, 8,
    ),
    "Llama-3.1-8B": ({**_LLAMA, **_sizes(4096, 14336, 32, 32, False)}, 8_030_261_248, 8),
    "Llama-3.1-70B": ({**_LLAMA, **_sizes(8192, 28672, 80, 64, False)}, 70_553_706_496, 8),
}  # fmt: skip

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
        "num_key_value_heads": 2, "vocab_size": 37, "max_position_embeddings": 64, "moe_intermediate_size": 16,
        "num_experts": 4, "num_experts_per_tok": 2}  # fmt: skip
FAMILIES = {"qwen3": _QWEN3, "qwen2": _QWEN2, "llama": _LLAMA, "qwen3_moe": {**_QWEN3, **_MOE}}


def write_config(path: Path, config: dict[str, Any]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return path


def tiny_config(family: str = "qwen3", *, tied: bool = False, **changes: Any) -> dict[str, Any]:
    return {**FAMILIES[family], **TINY, "tie_word_embeddings": tied, **changes}


def write_checkpoint(
    path: Path,
    config: dict[str, Any],
    *,
    role: Role = "actor",
    dtype: torch.dtype = torch.float32,
    max_file_bytes: int = 1 << 40,
    changes: dict[str, torch.Tensor | None] | None = None,
) -> dict[str, torch.Tensor]:
    """A checkpoint with random tensors; `changes` replaces, adds or (None) removes some. Returns its tensors."""
    write_config(path, config)
    generator = torch.Generator().manual_seed(0)
    shapes = hf_tensors(ModelSpec.from_hf(path), role)
    tensors: dict[str, Any] = {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}
    tensors |= changes or {}
    tensors = {n: t for n, t in tensors.items() if t is not None}
    plan = plan_files({n: TensorInfo(tuple(t.shape), t.dtype) for n, t in tensors.items()}, max_file_bytes)
    names = {file_name(i, len(plan)): infos for i, infos in enumerate(plan)}
    for name, infos in names.items():
        save_file({n: tensors[n] for n in infos}, path / name, metadata={"format": "pt"})
    write_index(path, names)
    (path / "tokenizer.json").write_text("{}")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    return tensors
