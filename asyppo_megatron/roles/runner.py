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
from asyppo_megatron.parallel.context import ContextSplit
from asyppo_megatron.parallel.layout import pack_multiples
from asyppo_megatron.parallel.process_groups import RoleGroups
from asyppo_megatron.types import MicroBatch, PackedBatch


@dataclass(frozen=True)
class Pack:
    """A micro-batch on the device: t tokens, of which a context-parallel rank runs t / cp through the model.

    Per-token work around the model is done on all t by every rank of the context-parallel group: it is small, and
    losses may need whole sequences.

    Attributes:
        plan: which trajectories and tokens it holds.
        index: i64 [real tokens], position in the batch of every real token.
        slots: i64 [real tokens], their positions in the pack; None where they are 0, 1, 2, ...
        tokens: i64 [1, t / cp], of this rank.
        params: Megatron's description of the sequences.
        split: how the tokens are split over context parallelism, or None.
    """

    plan: MicroBatch
    index: torch.Tensor
    slots: torch.Tensor | None
    tokens: torch.Tensor
    params: Any
    split: ContextSplit | None = None

    def gather(self, x: torch.Tensor, fill: float | bool = 0) -> torch.Tensor:
        """A batch's `[T]` tensor as this pack's `[t]`."""
        return _placed(x.index_select(0, self.index), self.plan, self.slots, fill)

    def local(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's [t / cp, ...] of a pack's [t, ...]."""
        return x if self.split is None else self.split.local(x)

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """The pack's [t, ...] from each rank's [t / cp, ...]; called by every rank of the context-parallel group.

        Differentiable where all of those ranks compute the same loss from it.
        """
        return x if self.split is None else self.split.gather(x, sum_gradients=False)

    @property
    def cu_seqlens(self) -> torch.Tensor:
        return self.params.cu_seqlens_q


def _placed(real: torch.Tensor, plan: MicroBatch, slots: torch.Tensor | None, fill: float | bool = 0) -> torch.Tensor:
    """A pack's real tokens [real tokens] among its padding, [t]."""
    if slots is not None:
        return real.new_full((plan.num_tokens,), fill).index_copy_(0, slots, real)
    return torch.nn.functional.pad(real, (0, plan.num_padding), value=fill) if plan.num_padding else real


def make_pack(plan: MicroBatch, tokens: torch.Tensor, cp_group: Any = None) -> Pack:
    """Put a micro-batch of `tokens` i32 [T] on their device; `cp_group` only where it is of several ranks."""
    device = tokens.device
    index = plan.token_index.to(device, non_blocking=True)
    slots = None if plan.slots is None else plan.slots.to(device, non_blocking=True)
    split = None if cp_group is None else ContextSplit.of(plan.cu_seqlens, cp_group, device)
    ids = _placed(tokens.index_select(0, index).long(), plan, slots)
    params = packed_seq_params(plan.cu_seqlens.to(device, non_blocking=True), plan.num_tokens, plan.max_seqlen, split)
    return Pack(plan, index, slots, (ids if split is None else split.local(ids))[None], params, split)


class PackRunner:
    """Runs packs through one rank's part of a model, whatever the pipeline."""

    def __init__(self, model: Any, model_config: Any, groups: RoleGroups, max_tokens: int):
        self.model, self.model_config, self.groups, self.max_tokens = model, model_config, groups, max_tokens
        self.communicator = (
            P2PCommunicator(pp_group=groups.collection.pp, config=model_config) if groups.layout.pp > 1 else None
        )

    def packs(self, batch: PackedBatch, trajectories: torch.Tensor) -> list[Pack]:
        """This rank's micro-batches of some trajectories (i64 [n], on the CPU) of a batch."""
        layout = self.groups.layout
        plans = plan_micro_batches(
            batch.cu_seqlens,
            trajectories,
            dp_size=layout.dp,
            max_tokens=self.max_tokens,
            fixed_size=self.communicator is not None,
            **pack_multiples(layout, self.model_config.sequence_parallel),
        )
        cp_group = self.groups.collection.cp if layout.cp > 1 else None
        return [make_pack(plan, batch.tokens, cp_group) for plan in plans[self.groups.at.dp]]

    def run(
        self,
        packs: Sequence[Pack],
        finish: Callable[[torch.Tensor, Pack], tuple[torch.Tensor, Any]],
        expect: Callable[[Pack], None] | None = None,
        *,
        forward_only: bool,
    ) -> list[Any]:
        """One schedule over micro-batches; `finish` maps the output to `(loss, collected)`.

        Args:
            expect: is told of a pack before its forward pass, on the last stage.

        Returns:
            What `finish` collected, one item a micro-batch, on the last pipeline stage; empty elsewhere.
        """
        count = torch.zeros((), dtype=torch.int, device=packs[0].tokens.device)

        def step(iterator: Any, model: Any) -> Any:
            pack = next(iterator)
            if expect is not None and self.groups.is_last_stage:
                expect(pack)
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

    def forward(
        self,
        packs: Sequence[Pack],
        collect: Callable[[torch.Tensor, Pack], Any],
        expect: Callable[[Pack], None] | None = None,
    ) -> list[Any]:
        """Forward passes without gradients; `collect(output, pack)` and `expect(pack)` run on the last stage."""

        def finish(out: torch.Tensor, pack: Pack) -> tuple[torch.Tensor, Any]:
            return out.new_zeros(()), collect(out, pack)

        with torch.no_grad():
            return self.run(packs, finish, expect, forward_only=True)


def scatter(parts: Sequence[torch.Tensor], packs: Sequence[Pack], num_tokens: int) -> torch.Tensor:
    """Per-pack results `[t]` back into one `[T]` tensor; 0 where no pack has the token."""
    out = torch.zeros(num_tokens, dtype=parts[0].dtype, device=parts[0].device)
    for part, pack in zip(parts, packs, strict=True):
        real = part[: pack.index.numel()] if pack.slots is None else part.index_select(0, pack.slots)
        out.index_copy_(0, pack.index, real)
    return out
