"""One name for every Megatron parameter, whichever layer spec, pipeline stage or wrapper it comes from.

Canonical names are those of the local layer spec with layers and experts counted over the whole model:
`decoder.layers.17.pre_mlp_layernorm.weight`, `decoder.layers.17.mlp.experts.5.linear_fc1.weight`.
Transformer Engine fuses a norm into the linear layer behind it and names it after that layer.
"""

from __future__ import annotations

import re

from torch import nn

_FROM_TRANSFORMER_ENGINE = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT_LOCAL = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(linear_fc[12])\.weight")
_EXPERT_GROUPED = re.compile(r"mlp\.experts\.(linear_fc[12])\.weight(\d+)")


def unwrap(model: nn.Module) -> nn.Module:
    """The GPTModel inside DDP and Float16Module."""
    while hasattr(model, "module"):
        model = model.module
    return model


def canonical(name: str, layer_offset: int = 0, expert_offset: int = 0) -> str:
    """The canonical form of a parameter name of either layer spec.

    Args:
        name: as `named_parameters` of a GPTModel gives it.
        layer_offset: global number of the module's layer 0 (its pipeline stage starts there).
        expert_offset: global number of this rank's expert 0.
    """
    match = _LAYER.fullmatch(name)
    if match is None:
        return name
    layer, rest = int(match[1]) + layer_offset, match[2]
    rest = _FROM_TRANSFORMER_ENGINE.get(rest, rest)
    if expert := _EXPERT_LOCAL.fullmatch(rest):
        rest = f"mlp.experts.{int(expert[1]) + expert_offset}.{expert[2]}.weight"
    elif expert := _EXPERT_GROUPED.fullmatch(rest):
        rest = f"mlp.experts.{int(expert[2]) + expert_offset}.{expert[1]}.weight"
    return f"decoder.layers.{layer}.{rest}"


def named_parameters(model: nn.Module, expert_offset: int = 0) -> dict[str, nn.Parameter]:
    """Canonical name -> parameter of a model or pipeline stage, wrapped or not."""
    gpt = unwrap(model)
    layers = gpt.decoder.layers
    offset = layers[0].layer_number - 1 if len(layers) else 0
    return {canonical(n, offset, expert_offset): p for n, p in gpt.named_parameters()}


_TO_TRANSFORMER_ENGINE = {v: k for k, v in _FROM_TRANSFORMER_ENGINE.items()}
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(linear_fc[12]\.weight)")


def checkpoint_keys(name: str) -> list[tuple[str, tuple[int, ...]]]:
    """Where a distributed checkpoint may keep a canonical parameter, the usual place first.

    Megatron stacks the layers (and experts) of a model under one key. Its keys for norms are Transformer Engine's
    in both layer specs, but for a mixture of experts, where the two specs differ.

    Returns:
        (key, index): the parameter is `tensor[index]` of the key's tensor.
    """
    match = _LAYER.fullmatch(name)
    if match is None:
        return [(name, ())]
    layer, rest = int(match[1]), match[2]
    index: tuple[int, ...] = ()
    if expert := _EXPERT.fullmatch(rest):
        rest, index = f"mlp.experts.experts.{expert[2]}", (int(expert[1]),)
    forms = dict.fromkeys((_TO_TRANSFORMER_ENGINE.get(rest, rest), rest))
    stacked = [(f"decoder.layers.{form}", (layer, *index)) for form in forms]
    return stacked + [(f"decoder.layers.{layer}.{form}", index) for form in forms]
