"""Megatron-Core GPT models from a `ModelSpec`; the only import of GPTModel."""

from __future__ import annotations

import logging
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint

from asyppo_megatron.backend import has_transformer_engine
from asyppo_megatron.config import LayoutConfig
from asyppo_megatron.models.attention import FLASH_MULTIPLE, PackedAttention
from asyppo_megatron.models.rope import inverse_frequencies
from asyppo_megatron.models.spec import ModelSpec
from asyppo_megatron.models.value_head import ValueHead
from asyppo_megatron.parallel.process_groups import RoleGroups

logging.getLogger("megatron.core").setLevel(logging.ERROR)  # a deprecation notice of GPTModel, once a model


class TorchRMSNorm(torch.nn.RMSNorm):
    """RMSNorm that Megatron's sequence parallelism accepts (its own torch norm refuses it)."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # summed over tp


class Model(GPTModel):
    """GPTModel whose checkpoint entry of a tied output layer does not ask `parallel_state` for this rank's place."""

    def tie_embeddings_and_output_weights_state_dict(
        self, sharded_state_dict: dict[str, Any], output_key: str, embedding_key: str, metadata: Any = None
    ) -> None:
        if self.pre_process or not self.post_process:
            return  # the embedding itself, or no output layer
        dp_cp = self.pg_collection.dp_cp
        sharded_state_dict[output_key] = make_tp_sharded_tensor_for_checkpoint(
            tensor=self.shared_embedding_or_output_weight(),
            key=embedding_key,
            replica_id=(1, 0, dp_cp.rank()),  # 1: a copy of the first stage's
            allow_shape_mismatch=True,
            tp_group=self.pg_collection.tp,
            dp_cp_group=dp_cp,
        )


def transformer_config(
    spec: ModelSpec, layout: LayoutConfig, *, precision: str, recompute: str, finalize: Any = None
) -> TransformerConfig:
    """Megatron's configuration of a model; all fusions that need a GPU library follow from what is installed."""
    te = has_transformer_engine()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    config = TransformerConfig(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        num_attention_heads=spec.num_heads,
        num_query_groups=spec.num_kv_heads,
        kv_channels=spec.head_dim,
        ffn_hidden_size=spec.ffn_hidden_size or spec.expert_ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=spec.rms_norm_eps,
        qk_layernorm=spec.qk_layernorm,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=spec.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        sequence_parallel=layout.sp,
        calculate_per_token_loss=True,  # losses arrive divided by the global count: Megatron must not rescale them
        finalize_model_grads_func=finalize,
        deallocate_pipeline_outputs=True,
        perform_initialization=False,  # every weight comes from a checkpoint
        bias_dropout_fusion=te,
        bias_activation_fusion=te,
        apply_rope_fusion=te,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        **_recompute(recompute),
        **_experts(spec),
    )
    config.asyppo_rope_theta, config.asyppo_rope_scaling = spec.rope_theta, spec.rope_scaling
    return config


def _recompute(mode: str) -> dict[str, Any]:
    if mode == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {"recompute_granularity": "selective"} if mode == "selective" else {}


def can_run(spec: ModelSpec) -> bool:
    """Whether this environment runs a model: the router of Megatron-Core 0.16 needs Transformer Engine."""
    return not spec.num_experts or hasattr(moe_utils, "te_general_gemm")


def _experts(spec: ModelSpec) -> dict[str, Any]:
    """A mixture of experts in every layer, each rank holding all of them; enough to look at a model's logits."""
    if not spec.num_experts:
        return {}
    return {
        "num_moe_experts": spec.num_experts,
        "moe_router_topk": spec.experts_per_token,
        "moe_ffn_hidden_size": spec.expert_ffn_hidden_size,
        # Weights of the chosen experts: their softmax among themselves, or among all experts and not renormalised.
        "moe_router_pre_softmax": not spec.norm_topk_prob,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",  # the other one wants CUDA streams
    }


def _has_te_attention(config: TransformerConfig, spec: ModelSpec) -> bool:
    """Whether Transformer Engine has a kernel for these packs: its fused ones take neither fp32 nor odd head sizes."""
    return has_transformer_engine() and config.params_dtype == torch.bfloat16 and spec.head_dim % FLASH_MULTIPLE == 0


def _layer_specs(config: TransformerConfig, spec: ModelSpec, pp_rank: int) -> Any:
    if has_transformer_engine():
        fused = get_gpt_layer_with_transformer_engine_spec(
            num_experts=spec.num_experts or None, qk_layernorm=spec.qk_layernorm
        )
        if not _has_te_attention(config, spec):
            fused.submodules.self_attention.submodules.core_attention = PackedAttention
        return fused
    layer = get_gpt_layer_local_spec(
        num_experts=spec.num_experts or None, qk_layernorm=spec.qk_layernorm, normalization="RMSNorm"
    )
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = TorchRMSNorm
    attention = parts.self_attention.submodules
    attention.core_attention = PackedAttention
    if spec.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = TorchRMSNorm
    count = get_num_layers_to_build(config, pp_rank=pp_rank)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=TorchRMSNorm)


def build_model(
    spec: ModelSpec, config: TransformerConfig, groups: RoleGroups, *, value_head: bool, trainable: bool = True
) -> GPTModel:
    """This rank's part of a model, weights uninitialised (norms are ones).

    Args:
        value_head: replace the language head by a scalar head (a critic).
        trainable: False for a frozen model: no gradients are kept.
    """
    te_attention = _has_te_attention(config, spec)
    model = Model(
        config=config,
        transformer_layer_spec=_layer_specs(config, spec, groups.at.pp),
        vocab_size=spec.padded_vocab(groups.layout.tp),
        max_sequence_length=spec.max_position_embeddings,
        pre_process=groups.is_first_stage,
        post_process=groups.is_last_stage,
        share_embeddings_and_output_weights=spec.tied and not value_head,
        # Our attention rotates by itself; Transformer Engine's needs Megatron's table.
        position_embedding_type="rope" if te_attention else "none",
        rotary_base=int(spec.rope_theta),
        pg_collection=groups.collection,
    )
    if te_attention:
        table = inverse_frequencies(spec.head_dim, spec.rope_theta, spec.rope_scaling)
        model.rotary_pos_emb.inv_freq = table.to(model.rotary_pos_emb.inv_freq.device)
    _mark_sharded(model)
    if value_head and groups.is_last_stage:
        model.output_layer = ValueHead(config, groups.collection.tp)
    if not trainable:
        model.requires_grad_(False)
    return model


def _mark_sharded(model: GPTModel) -> None:
    """Mark the weights that tensor parallelism cuts: older Megatron-Core does so only where it initialises them.

    An unmarked weight counts as a replica: gradient norms, and so clipping, would leave out all shards but the first.
    """
    for module in model.modules():
        is_row = isinstance(module, RowParallelLinear)
        if is_row or isinstance(module, ColumnParallelLinear | VocabParallelEmbedding):
            weight = module.weight
            if weight is not None and not hasattr(weight, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(weight, True, 1 if is_row else 0, 1)
