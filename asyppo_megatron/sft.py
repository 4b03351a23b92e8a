"""Supervised training of one or several models through the same role, packs and optimizer as the main job.

Makes the demo's base models. Every task trains one model on its own ranks; tasks run side by side.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from asyppo_megatron.backend import init_distributed, prepare_megatron
from asyppo_megatron.config import RoleConfig
from asyppo_megatron.convert.export_hf import export_hf
from asyppo_megatron.convert.load import load_hf
from asyppo_megatron.kernels.policy import choose
from asyppo_megatron.models.spec import ModelSpec
from asyppo_megatron.parallel.layout import ParallelLayout
from asyppo_megatron.parallel.process_groups import GroupRegistry, build_groups
from asyppo_megatron.parallel.seeding import derive_seed
from asyppo_megatron.roles.policy_head import LogitsHead
from asyppo_megatron.roles.role import Role, skip_optimizer_construction
from asyppo_megatron.roles.runner import Pack
from asyppo_megatron.types import PackedBatch, Trajectory, pack_trajectories

logger = logging.getLogger(__name__)
_LOG_EVERY = 100


@dataclass(frozen=True)
class Example:
    """A prompt and the response to imitate, as token ids."""

    prompt: np.ndarray
    response: np.ndarray


@dataclass(frozen=True)
class SupervisedTask:
    """One model to train.

    Attributes:
        config: `model` is the Hugging Face directory to start from.
        out: Hugging Face directory to write.
        steps: optimizer steps.
        batch_size: examples a step.
    """

    name: str
    config: RoleConfig
    out: Path
    steps: int
    batch_size: int


def run_supervised(tasks: Sequence[SupervisedTask], examples: Sequence[Example], seed: int) -> None:
    """One rank of the training; the environment names the world (see `launch.local`)."""
    env = os.environ
    rank, world_size = int(env["RANK"]), int(env["WORLD_SIZE"])
    device, _ = init_distributed(rank, world_size, int(env["LOCAL_RANK"]), 600.0)
    prepare_megatron()
    registry = GroupRegistry()
    mine: list[tuple[SupervisedTask, Role]] = []
    for task in tasks:
        groups = build_groups(ParallelLayout.of(task.config), registry)
        if groups is None:
            skip_optimizer_construction()
            continue
        spec = ModelSpec.from_hf(task.config.model)
        role = Role(task.name, task.config, spec, groups, value_head=False, total_updates=task.steps)
        load_hf(role.module, spec, task.config.model, tp_rank=groups.at.tp, tp_size=groups.layout.tp)
        role.weights_changed()
        mine.append((task, role))
    for task, role in mine:
        _train(task, role, examples, seed, device)
        export_hf(role.module, role.spec, task.out, task.config.model, role.groups, force=True)
    dist.barrier()


def _train(task: SupervisedTask, role: Role, examples: Sequence[Example], seed: int, device: torch.device) -> None:
    """Token-mean negative log-likelihood of the responses; every rank draws the same batches."""
    generator = np.random.default_rng(derive_seed(seed, "supervised"))
    everything = torch.arange(task.batch_size)
    head = LogitsHead(choose(device), role.groups, role.spec.vocab_size, 1.0)
    for step in range(task.steps):
        chosen = generator.integers(len(examples), size=task.batch_size)
        batch = supervised_batch([examples[i] for i in chosen], step, device)
        labels, count = batch.labels(), batch.loss_mask.sum()

        def loss(
            out: torch.Tensor,
            pack: Pack,
            batch: PackedBatch = batch,
            labels: torch.Tensor = labels,
            count: torch.Tensor = count,
        ) -> tuple[torch.Tensor, Any]:
            logprobs, _ = head.scores(out, pack, labels)
            total = -torch.where(pack.gather(batch.loss_mask), logprobs, 0).sum() / count
            return total, total.detach()

        parts = role.accumulate(role.runner.packs(batch, everything), loss)
        norm, _ = role.step()
        if role.groups.is_last_stage and (step % _LOG_EVERY == 0 or step + 1 == task.steps):
            whole = torch.stack(parts).sum()
            dist.all_reduce(whole, group=role.groups.collection.dp)
            if role.groups.is_lead:
                logger.info("%s step %d: loss %.4f, gradient norm %.3f", task.name, step, whole.item(), norm)


def supervised_batch(examples: Sequence[Example], step: int, device: torch.device) -> PackedBatch:
    """Examples as a batch whose trainable tokens are the responses."""
    arrays = pack_trajectories(
        [
            Trajectory(
                prompt_id=str(i),
                group=i,
                sample=0,
                prompt_tokens=e.prompt,
                response_tokens=e.response,
                rollout_logprobs=np.zeros(len(e.response), dtype=np.float32),
                reward=0.0,
                finish_reason="stop",
                policy_version=0,
            )
            for i, e in enumerate(examples)
        ],
        step,
    )
    names = arrays.keys() & {f.name for f in fields(PackedBatch)}  # the arrays also say which weights generated what
    tensors = {name: torch.from_numpy(arrays[name]) for name in names}
    return PackedBatch(
        step=step,
        policy_version=0,
        **{name: t if name == "cu_seqlens" else t.to(device) for name, t in tensors.items()},
    )
