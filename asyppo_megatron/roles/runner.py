"""Packs on the device, and Megatron's schedules over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from asyppo_megatron.models.attention import packed_seq_params
from asyppo_megatron.packing import plan_micro_batches
from asyppo_megatron.parallel.process_groups import RoleGroups
from asyppo_megatron.types import MicroBatch, PackedBatch


@dataclass(frozen=True)
class Pack:
    """A micro-batch on the device.

    Attributes:
        plan: which trajectories and tokens it holds.
        index: i64 [t], position in the batch of every real token.
        tokens: i64 [1, t + padding].
        params: Megatron's description of the sequences.
    """

    plan: MicroBatch
    index: torch.Tensor
    tokens: torch.Tensor
    params: Any

    def gather(self, x: torch.Tensor, fill: float | bool = 0) -> torch.Tensor:
        """A batch's `[T]` tensor as this pack's `[t + padding]`."""
        picked = x.index_select(0, self.index)
        return (
            torch.nn.functional.pad(picked, (0, self.plan.num_padding), value=fill) if self.plan.num_padding else picked
        )

    @property
    def cu_seqlens(self) -> torch.Tensor:
        return self.params.cu_seqlens_q


def make_pack(plan: MicroBatch, tokens: torch.Tensor) -> Pack:
    """Put a micro-batch of `tokens` i32 [T] on their device."""
    device = tokens.device
    index = plan.token_index.to(device, non_blocking=True)
    ids = tokens.index_select(0, index).long()
    if plan.num_padding:
        ids = torch.nn.functional.pad(ids, (0, plan.num_padding))
    cu_seqlens = plan.cu_seqlens.to(device, non_blocking=True)
    return Pack(plan, index, ids[None], packed_seq_params(cu_seqlens, plan.num_tokens, plan.max_seqlen))


class PackRunner:
    """Runs packs through one rank's part of a model, whatever the pipeline."""

    def __init__(self, model: Any, model_config: Any, groups: RoleGroups, max_tokens: int):
        self.model, self.model_config, self.groups, self.max_tokens = model, model_config, groups, max_tokens
        self.communicator = (
            P2PCommunicator(pp_group=groups.collection.pp, config=model_config) if groups.layout.pp > 1 else None
        )

    def packs(self, batch: PackedBatch, trajectories: torch.Tensor) -> list[Pack]:
        """This rank's micro-batches of some trajectories (i64 [n], on the CPU) of a batch."""
        plans = plan_micro_batches(
            batch.cu_seqlens,
            trajectories,
            dp_size=self.groups.layout.dp,
            max_tokens=self.max_tokens,
            multiple=self.groups.layout.tp if self.model_config.sequence_parallel else 1,
            fixed_size=self.communicator is not None,
        )
        return [make_pack(plan, batch.tokens) for plan in plans[self.groups.at.dp]]

    def run(
        self,
        packs: Sequence[Pack],
        finish: Callable[[torch.Tensor, Pack], tuple[torch.Tensor, Any]],
        *,
        forward_only: bool,
    ) -> list[Any]:
        """One schedule over micro-batches; `finish` maps the output to `(loss, collected)`.

        Returns:
            What `finish` collected, one item a micro-batch, on the last pipeline stage; empty elsewhere.
        """
        count = torch.zeros((), dtype=torch.int, device=packs[0].tokens.device)

        def step(iterator: Any, model: Any) -> Any:
            pack = next(iterator)
            output = model(input_ids=pack.tokens, position_ids=None, attention_mask=None, packed_seq_params=pack.params)

            def loss(out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
                value, collected = finish(out, pack)
                return value, count, collected

            return output, loss

        extra: dict[str, Any] = {}
        schedule = schedules.forward_backward_no_pipelining
        if self.communicator is not None:
            schedule = schedules.forward_backward_pipelining_without_interleaving
            extra["p2p_communicator"] = self.communicator
        collected: list[Any] = schedule(
            forward_step_func=step,
            data_iterator=iter(packs),
            model=self.model,
            num_microbatches=len(packs),
            seq_length=packs[0].plan.num_tokens,
            micro_batch_size=1,
            forward_only=forward_only,
            pg_collection=self.groups.collection,
            **extra,
        )
        return collected

    def forward(self, packs: Sequence[Pack], collect: Callable[[torch.Tensor, Pack], Any]) -> list[Any]:
        """Forward passes without gradients; `collect(output, pack)` runs on the last stage."""
        with torch.no_grad():
            return self.run(packs, lambda out, pack: (out.new_zeros(()), collect(out, pack)), forward_only=True)


def scatter(parts: Sequence[torch.Tensor], packs: Sequence[Pack], num_tokens: int) -> torch.Tensor:
    """Per-pack results `[t + padding]` back into one `[T]` tensor; 0 where no pack has the token."""
    out = torch.zeros(num_tokens, dtype=parts[0].dtype, device=parts[0].device)
    for part, pack in zip(parts, packs, strict=True):
        out.index_copy_(0, pack.index, part[: pack.index.numel()])
    return out
