"""One trained model on this rank: groups, Megatron model, DDP, optimizer, schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import _get_param_groups, get_megatron_optimizer

from asyppo_megatron.backend import adamw_state
from asyppo_megatron.config import OptimizerConfig, RoleConfig
from asyppo_megatron.models.gpt import build_model, transformer_config
from asyppo_megatron.models.spec import ModelSpec
from asyppo_megatron.parallel.process_groups import RoleGroups
from asyppo_megatron.roles.runner import Pack, PackRunner


def learning_rate(config: OptimizerConfig, update: int, total_updates: int) -> float:
    """Learning rate of the update-th optimizer step (0-based): linear warm-up, then the chosen decay.

    The first step already learns: warm-up over w steps uses lr * 1/w, 2/w, ... 1.
    """
    if update < config.warmup_steps:
        return config.lr * (update + 1) / config.warmup_steps
    if config.decay == "constant":
        return config.lr
    span = max((config.decay_steps or total_updates) - config.warmup_steps, 1)
    progress = min((update - config.warmup_steps) / span, 1.0)
    keep = 1 - progress if config.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + (config.lr - config.min_lr) * keep


def _finalize(model: Any, num_tokens: Any, pg_collection: Any = None, force_all_reduce: bool | None = False) -> None:
    """Megatron's gradient reductions without its rescaling by tokens (losses carry the global denominator)."""
    finalize_model_grads(model, None, pg_collection=pg_collection, force_all_reduce=force_all_reduce)


def skip_optimizer_construction() -> None:
    """What a rank outside a role does while its members build their optimizer.

    Megatron gathers the parameter groups' keys over the WORLD twice (dense and expert parameters) and so must
    be met by every rank.
    """
    for _ in range(2):
        _get_param_groups([], MegatronOptimizerConfig(optimizer="adam", lr=0.0, min_lr=0.0), {})


class Role:
    """A model that trains.

    Construction is a collective of the world in one respect: ranks outside the role call
    `skip_optimizer_construction` at the same place.
    """

    def __init__(
        self,
        name: str,
        config: RoleConfig,
        spec: ModelSpec,
        groups: RoleGroups,
        *,
        value_head: bool,
        total_updates: int,
    ):
        self.name, self.config, self.spec, self.groups = name, config, spec, groups
        self.total_updates, self.updates = total_updates, 0
        self.model_config = transformer_config(
            spec, config.layout, precision=config.precision, recompute=config.recompute, finalize=_finalize
        )
        self.value_head = value_head
        self.module = build_model(spec, self.model_config, groups, value_head=value_head)
        self.device = next(self.module.parameters()).device
        self.ddp = DistributedDataParallel(
            self.model_config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True, use_distributed_optimizer=config.optimizer.distributed
            ),
            self.module,  # built in its dtype: Float16Module would only copy the logits to fp32
            pg_collection=groups.collection,
        )
        self.optimizer = get_megatron_optimizer(
            _optimizer_config(config), [self.ddp], use_gloo_process_groups=False, pg_collection=groups.collection
        )
        self.runner = PackRunner(self.ddp, self.model_config, groups, config.max_tokens_per_micro_batch)

    @property
    def log_name(self) -> str:
        at = self.groups.at
        return f"{self.name} tp{at.tp} pp{at.pp} dp{at.dp}"

    def weights_changed(self) -> None:
        """Call after writing parameters from outside: refreshes the optimizer's fp32 copies."""
        self.optimizer.reload_model_params()

    def accumulate(
        self,
        packs: Sequence[Pack],
        loss: Callable[[torch.Tensor, Pack], tuple[torch.Tensor, Any]],
        expect: Callable[[Pack], None] | None = None,
    ) -> list[Any]:
        """Gradients of one mini-batch into the (zeroed) gradient buffers, reduced over the role.

        Args:
            loss: maps a pack's output to its share of the mini-batch's loss, the global denominator applied,
                and to what is to be collected.
            expect: is told of a pack before its forward pass, on the last stage.
        """
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self.runner.run(packs, loss, expect, forward_only=False)

    def step(self) -> tuple[float, float]:
        """One optimizer step. Returns the gradient norm before clipping and the learning rate."""
        config = self.config.optimizer
        lr = learning_rate(config, self.updates, self.total_updates)
        for group in self.optimizer.param_groups:  # a checkpoint may have brought those of another configuration
            group["lr"] = lr
            group["weight_decay"] = config.weight_decay * group.get("wd_mult", 1.0)
            group["betas"], group["eps"] = (config.beta1, config.beta2), config.eps
        _, norm, _ = self.optimizer.step()
        self.updates += 1
        return float(norm), lr

    def prepare_state(self) -> None:
        """Make the optimizer's state exist, so that it can be saved or loaded before the first step."""
        adamw_state.create_lazy_state(self.optimizer)


def _optimizer_config(config: RoleConfig) -> MegatronOptimizerConfig:
    o = config.optimizer
    bf16 = config.precision == "bf16"
    return MegatronOptimizerConfig(
        optimizer="adam",
        # Rates are set at every step. Given here, they would become part of a parameter group's identity in Megatron,
        # and a run could not be resumed with another rate.
        lr=0.0,
        min_lr=0.0,
        weight_decay=o.weight_decay,
        adam_beta1=o.beta1,
        adam_beta2=o.beta2,
        adam_eps=o.eps,
        clip_grad=o.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=o.distributed,
    )
