"""The reference model: a frozen policy that a KL term compares with."""

from __future__ import annotations

from pathlib import Path

import torch

from asyppo_megatron.config import ActorConfig
from asyppo_megatron.convert.load import load_hf
from asyppo_megatron.kernels.policy import Operators
from asyppo_megatron.models.gpt import build_model, transformer_config
from asyppo_megatron.models.spec import ModelSpec
from asyppo_megatron.parallel.process_groups import RoleGroups
from asyppo_megatron.roles.policy_head import build_head
from asyppo_megatron.roles.runner import PackRunner, scatter
from asyppo_megatron.types import PackedBatch


class Reference:
    """Runs on the actor's ranks in the actor's layout; has no gradients and no optimizer."""

    def __init__(
        self,
        path: Path,
        config: ActorConfig,
        spec: ModelSpec,
        groups: RoleGroups,
        operators: Operators,
        *,
        temperature: float,
    ):
        self.spec, self.groups = spec, groups
        model_config = transformer_config(spec, config.layout, precision=config.precision, recompute="none")
        self.model = build_model(spec, model_config, groups, value_head=False, trainable=False).eval()
        load_hf(self.model, spec, path, tp_rank=groups.at.tp, tp_size=groups.layout.tp)
        self.runner = PackRunner(self.model, model_config, groups, config.max_tokens_per_micro_batch)
        self.head = build_head(config, operators, self.runner, self.model, spec.vocab_size, temperature)

    def evaluate(self, batch: PackedBatch) -> dict[str, torch.Tensor]:
        """{"reference_logprobs": f32 [T]} on output ranks."""
        packs = self.runner.packs(batch, torch.arange(batch.num_trajectories))
        labels = batch.labels()
        results = self.runner.forward(
            packs,
            lambda out, pack: self.head.scores(out, pack, labels)[0],
            lambda pack: self.head.expect_scores(pack, labels),
        )
        if not self.groups.is_output:
            return {}
        logprobs = scatter(results, packs, batch.num_tokens)
        return {"reference_logprobs": torch.where(batch.loss_mask, logprobs, 0)}
