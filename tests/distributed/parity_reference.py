"""What the distributed roles are compared with: Hugging Face models, torch's AdamW and `ppo/`, in one process.

Sequences run one at a time without padding or packing. Not a test file.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch

from asyppo_megatron.config import OptimizerConfig, PPOConfig
from asyppo_megatron.convert.critic import initial_value_head
from asyppo_megatron.packing import mini_batches
from asyppo_megatron.parallel.seeding import derive_seed
from asyppo_megatron.ppo.ensemble import assign_critics
from asyppo_megatron.ppo.losses import policy_loss, value_loss
from asyppo_megatron.types import PackedBatch, Targets

Named = dict[str, torch.Tensor]


class Policy:
    """A Hugging Face causal language model; scores of packed batches by plain log-softmax."""

    def __init__(self, path: Path, temperature: float):
        import transformers

        self.model = transformers.Qwen3ForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.temperature = temperature

    def named(self) -> Named:
        return dict(self.model.named_parameters())

    def scores(self, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logprobs of the actions and entropies, [T] each."""
        logprobs, entropies = [], []
        for ids in sequences(batch):
            table = torch.log_softmax(self.model(input_ids=ids[None]).logits[0] / self.temperature, -1)
            actions = torch.cat([ids[1:], ids[:1] * 0])
            logprobs.append(table.gather(-1, actions[:, None])[:, 0])
            entropies.append(-(table.exp() * table).sum(-1))
        return torch.cat(logprobs), torch.cat(entropies)


class Valuer:
    """A Hugging Face backbone with a linear head; values of packed batches."""

    def __init__(self, path: Path, head_seed: int):
        import transformers

        self.backbone = transformers.Qwen3Model.from_pretrained(path, dtype=torch.float32)
        self.head = torch.nn.Linear(self.backbone.config.hidden_size, 1)
        weight, bias = initial_value_head(self.head.in_features, head_seed)
        with torch.no_grad():
            self.head.weight.copy_(weight)
            self.head.bias.copy_(bias)

    def named(self) -> Named:
        body = {f"model.{name}": p for name, p in self.backbone.named_parameters()}
        return body | {"score.weight": self.head.weight, "score.bias": self.head.bias}

    def values(self, batch: PackedBatch) -> torch.Tensor:
        hidden = [self.backbone(input_ids=ids[None]).last_hidden_state[0] for ids in sequences(batch)]
        return self.head(torch.cat(hidden))[:, 0]


def sequences(batch: PackedBatch) -> list[torch.Tensor]:
    cu = batch.cu_seqlens.tolist()
    return [batch.tokens[start:end].long() for start, end in pairwise(cu)]


class Trainer:
    """AdamW and clipping by Megatron's rules: 1-D parameters and biases do not decay; 1e-6 in the clip factor."""

    def __init__(self, parameters: Named, config: OptimizerConfig):
        self.parameters, self.config = parameters, config
        self.before = {name: p.detach().clone() for name, p in parameters.items()}
        self.gradients: Named = {}  # of the first step, before clipping
        self.norms: list[float] = []
        self.losses: list[float] = []
        flat = [p for n, p in parameters.items() if p.dim() == 1 or n.endswith(".bias")]
        rest = [p for n, p in parameters.items() if p.dim() > 1 and not n.endswith(".bias")]
        self.optimizer = torch.optim.AdamW(
            [{"params": rest}, {"params": flat, "weight_decay": 0.0}],
            lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, weight_decay=config.weight_decay,
        )  # fmt: skip

    def step(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=False)
        loss.backward()
        self.losses.append(loss.item())
        if not self.gradients:
            self.gradients = {n: p.grad.clone() for n, p in self.parameters.items() if p.grad is not None}
        limit = self.config.clip_grad or float("inf")
        self.norms.append(float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit)))
        self.optimizer.step()

    def updates(self) -> Named:
        return {name: p.detach() - self.before[name] for name, p in self.parameters.items()}


def train_policy(
    policy: Policy,
    trainer: Trainer,
    batch: PackedBatch,
    targets: Targets,
    ppo: PPOConfig,
    parts: Sequence[torch.Tensor],
) -> None:
    """One optimizer step a mini-batch (i64 [n], trajectories)."""
    for chosen in parts:
        mask = batch.loss_mask & of_trajectories(batch, chosen)
        logprobs, entropies = policy.scores(batch)
        total, count = policy_loss(
            logprobs, entropies, targets.old_logprobs, targets.advantages, mask, batch.cu_seqlens,
            kind=ppo.loss, advantage_mask=targets.advantage_mask, entropy_mask=targets.entropy_mask,
            entropy_coef=ppo.entropy_coef, clip_low=ppo.clip_low, clip_high=ppo.clip_high, aggregation=ppo.aggregation,
        )  # fmt: skip
        trainer.step(total / count)


def train_valuer(
    valuer: Valuer,
    trainer: Trainer,
    batch: PackedBatch,
    returns: torch.Tensor,
    parts: Sequence[torch.Tensor],
    old_values: torch.Tensor | None = None,
    value_clip: float | None = None,
) -> None:
    """One optimizer step a mini-batch (i64 [n], trajectories of the critic's share)."""
    for chosen in parts:
        selected = torch.zeros(batch.num_trajectories, dtype=torch.bool)
        selected[chosen] = True
        total, count = value_loss(
            valuer.values(batch), returns, batch.loss_mask, batch.cu_seqlens,
            trajectories=selected, value_clip=value_clip, old_values=old_values,
        )  # fmt: skip
        trainer.step(total / count)


def of_trajectories(batch: PackedBatch, chosen: torch.Tensor) -> torch.Tensor:
    """bool [T]: positions of the chosen trajectories."""
    selected = torch.zeros(batch.num_trajectories, dtype=torch.bool)
    selected[chosen] = True
    return selected.repeat_interleave(batch.cu_seqlens.diff().long())


def share(batch: PackedBatch, critic: int, num_critics: int, seed: int) -> torch.Tensor:
    """Trajectories that a critic trains on, i64 [n]."""
    return (assign_critics(batch.group_ids, num_critics, seed=seed, step=batch.step) == critic).nonzero().flatten()


def critic_parts(
    batch: PackedBatch, critic: int, num_critics: int, seed: int, size: int | None, epochs: int
) -> list[torch.Tensor]:
    """The mini-batches of a critic's update, in order."""
    own = share(batch, critic, num_critics, seed)
    key = derive_seed(seed, "critic", critic)
    parts = []
    for epoch in range(epochs):
        parts += mini_batches(len(own), size or len(own), seed=key, step=batch.step, epoch=epoch)
    return [own[part] for part in parts]
