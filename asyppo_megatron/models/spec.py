"""The architecture of one model, read from the config.json of a Hugging Face directory; no code is executed.

Everything that builds, shards or converts a model asks this one object. No torch, no Megatron: the launcher and
the configuration checks use it on machines that have neither.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

FAMILIES = {"Qwen3": "qwen3", "Qwen2": "qwen2", "Llama": "llama", "Qwen3Moe": "qwen3_moe"}
_HEADS = ("ForCausalLM", "ForTokenClassification", "ForSequenceClassification")
_QK_LAYERNORM = {"qwen3", "qwen3_moe"}
_QKV_BIAS = {"qwen2"}
_DEFAULT_HEAD_DIM = {"qwen3": 128}  # transformers' default where config.json is silent
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


class Layout(Protocol):
    """What of a layout matters to a model."""

    @property
    def tp(self) -> int: ...
    @property
    def pp(self) -> int: ...


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only transformer in the terms that its families share.

    Attributes:
        family: "qwen3", "qwen2", "llama" or "qwen3_moe".
        ffn_hidden_size: width of the dense gated MLP; 0 where every layer is a mixture of experts.
        tied: the output layer is the embedding (actors only; a critic has a head of its own).
        rope_scaling: None, or the llama3 rule: factor, low_freq_factor, high_freq_factor and
            original_max_position_embeddings.
        qk_layernorm: RMSNorm of every query and key head.
        qkv_bias: q, k and v projections have biases; the output projection never has one.
        eos_token_ids: end-of-sequence tokens of config.json and generation_config.json.
        num_experts: 0 for dense models; then the other moe fields are 0 too.
        dtype: the dtype config.json names ("bfloat16"), None where it is silent.
    """

    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    tied: bool
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, float] | None
    max_position_embeddings: int
    qk_layernorm: bool
    qkv_bias: bool
    eos_token_ids: tuple[int, ...] = ()
    num_experts: int = 0
    experts_per_token: int = 0
    expert_ffn_hidden_size: int = 0
    norm_topk_prob: bool = False
    dtype: str | None = None

    @classmethod
    def from_hf(cls, path: str | Path) -> ModelSpec:
        """Read `path`/config.json (and the end-of-sequence tokens of generation_config.json).

        Raises:
            ValueError: missing file, unknown architecture, missing field, or a feature no family here has.
        """
        directory = Path(path)
        config = _read_json(directory / "config.json")
        return _from_config(config, directory / "config.json", _generation_eos(directory))

    @classmethod
    def from_architecture(cls, config: dict[str, Any], where: Path) -> ModelSpec:
        """From the keys of a config.json that lie elsewhere.

        Raises:
            ValueError: as `from_hf`, naming `where`.
        """
        return _from_config(config, where, ())

    def padded_vocab(self, tp: int) -> int:
        """Rows of the embedding and output layer over all tp ranks: the vocabulary rounded up to a multiple of tp."""
        return -(-self.vocab_size // tp) * tp

    def layout_errors(self, layout: Layout, name: str) -> list[str]:
        """What keeps this model from running in a layout; empty when nothing does."""
        errors = []
        parts = [("num_heads", self.num_heads), ("num_kv_heads", self.num_kv_heads)]
        parts += [("ffn_hidden_size", self.ffn_hidden_size), ("expert_ffn_hidden_size", self.expert_ffn_hidden_size)]
        for field, size in parts:
            if size % layout.tp:
                errors.append(
                    f"{name}.layout.tp: got {layout.tp}, need a divisor of the model's {field} {size}; lower tp"
                )
        if self.num_layers % layout.pp:
            errors.append(
                f"{name}.layout.pp: got {layout.pp}, need a divisor of the model's num_layers {self.num_layers}; "
                "change pp"
            )
        return errors


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text())
    except OSError as e:
        raise ValueError(
            f"{path}: got {e.strerror or e}, need a readable file; point at a Hugging Face model directory"
        ) from e
    except ValueError as e:
        raise ValueError(f"{path}: got text that is not JSON ({e}), need a model config; fetch it again") from e
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: got {type(tree).__name__}, need a JSON object; fetch it again")
    return tree


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _generation_eos(directory: Path) -> tuple[int, ...]:
    path = directory / "generation_config.json"
    return _ids(_read_json(path).get("eos_token_id")) if path.exists() else ()


def _family(config: dict[str, Any], path: Path) -> str:
    known = ", ".join(f"{name}ForCausalLM" for name in FAMILIES)
    architectures = config.get("architectures") or []
    for architecture in architectures:
        for head in _HEADS:
            if architecture.endswith(head) and architecture.removesuffix(head) in FAMILIES:
                return FAMILIES[architecture.removesuffix(head)]
    if not architectures and config.get("model_type") in FAMILIES.values():
        return str(config["model_type"])
    found = architectures or config.get("model_type")
    raise ValueError(f"{path}: got architecture {found}, need one of {known}; choose a model of these families")


def _refuse_unsupported(config: dict[str, Any], path: Path, family: str) -> None:
    """Features that a config can switch on and that would silently change the model's function."""
    checks: list[tuple[str, Any, Any]] = [
        ("hidden_act", config.get("hidden_act", "silu"), "silu"),
        ("use_sliding_window", bool(config.get("use_sliding_window", False)), False),
        ("mlp_bias", bool(config.get("mlp_bias", False)), False),
    ]
    if family != "qwen2":
        checks.append(("attention_bias", bool(config.get("attention_bias", False)), False))
    if family == "qwen3_moe":
        checks.append(("decoder_sparse_step", config.get("decoder_sparse_step", 1), 1))
        checks.append(("mlp_only_layers", config.get("mlp_only_layers") or [], []))
    checks.append(("quantization_config", config.get("quantization_config"), None))
    for key, got, need in checks:
        if got != need:
            raise ValueError(f"{path}: {key}: got {got!r}, need {need!r}; this feature is not supported")


def _rope(config: dict[str, Any], path: Path) -> tuple[float, dict[str, float] | None]:
    """Base and scaling; transformers 5 keeps both in rope_parameters, earlier versions in two keys."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(scaling.get("rope_theta", config.get("rope_theta", 10000.0)))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(
            f"{path}: rope scaling: got type {kind!r}, need 'default' or 'llama3'; remove the scaling to train "
            "within the original context length"
        )
    missing = [k for k in _LLAMA3_KEYS if k not in scaling]
    if missing:
        raise ValueError(f"{path}: rope scaling llama3: got no {', '.join(missing)}, need all of {_LLAMA3_KEYS}")
    return theta, {k: scaling[k] for k in _LLAMA3_KEYS}


def _check_sizes(config: dict[str, Any], path: Path, moe: bool) -> None:
    required = ["num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size"]
    required += ["num_experts", "num_experts_per_tok", "moe_intermediate_size"] if moe else ["intermediate_size"]
    wrong = [k for k in required if not isinstance(config.get(k), int) or config[k] < 1]
    if wrong:
        got = ", ".join(f"{k}={config[k]!r}" if k in config else f"no {k}" for k in wrong)
        raise ValueError(f"{path}: got {got}, need a positive integer; complete the config")
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    if heads % kv_heads:
        raise ValueError(f"{path}: got num_attention_heads {heads} and num_key_value_heads {kv_heads}, need a multiple")


def _from_config(config: dict[str, Any], path: Path, generation_eos: tuple[int, ...]) -> ModelSpec:
    family = _family(config, path)
    _refuse_unsupported(config, path, family)
    moe = family == "qwen3_moe"
    if "num_local_experts" in config:  # transformers 5's name in files
        config = {**config, "num_experts": config["num_local_experts"]}
    _check_sizes(config, path, moe)
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    theta, scaling = _rope(config, path)
    return ModelSpec(
        family=family,
        num_layers=config["num_hidden_layers"],
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or _DEFAULT_HEAD_DIM.get(family, hidden // heads),
        ffn_hidden_size=0 if moe else config["intermediate_size"],
        vocab_size=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=int(config.get("max_position_embeddings", 32768)),
        qk_layernorm=family in _QK_LAYERNORM,
        qkv_bias=family in _QKV_BIAS,
        eos_token_ids=tuple(dict.fromkeys((*_ids(config.get("eos_token_id")), *generation_eos))),
        num_experts=config["num_experts"] if moe else 0,
        experts_per_token=config["num_experts_per_tok"] if moe else 0,
        expert_ffn_hidden_size=config["moe_intermediate_size"] if moe else 0,
        norm_topk_prob=moe and bool(config.get("norm_topk_prob", False)),
        dtype=config.get("dtype") or config.get("torch_dtype"),
    )
