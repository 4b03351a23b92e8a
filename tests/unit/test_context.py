"""Packs split over context parallelism: by hand, balanced, every token once; what the fused head refuses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from asyppo_megatron.config.checks import FUSED_LOSSES
from asyppo_megatron.kernels.reference import SEPARABLE
from asyppo_megatron.packing import plan_micro_batches
from asyppo_megatron.parallel.context import split_positions
from asyppo_megatron.parallel.layout import ParallelLayout, pack_multiples


def cu(*sizes: int) -> torch.Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)


def test_a_rank_has_an_early_and_a_late_chunk_of_every_sequence():
    assert split_positions(cu(8, 4), 2).tolist() == [[0, 1, 6, 7, 8, 11], [2, 3, 4, 5, 9, 10]]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_share_the_tokens_and_the_pairs_of_query_and_key(size: int):
    sizes = [2 * size, 6 * size, 10 * size]
    positions = split_positions(cu(*sizes), size)
    assert sorted(positions.flatten().tolist()) == list(range(sum(sizes)))
    starts = torch.cat([torch.full((n,), s) for n, s in zip(sizes, cu(*sizes).tolist(), strict=False)])
    pairs = [(own - starts[own] + 1).sum().item() for own in positions]
    assert len(set(pairs)) == 1


def test_sequences_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="multiples of 4"):
        split_positions(cu(8, 6), 2)


@pytest.mark.parametrize(
    ("tp", "cp", "sp", "expected"),
    [(1, 1, False, (1, 1)), (4, 1, True, (4, 1)), (1, 2, False, (4, 4)), (2, 2, True, (4, 4)), (4, 2, True, (8, 4)),
     (3, 2, True, (12, 4)), (4, 2, False, (4, 4))],
)  # fmt: skip
def test_packs_divide_by_what_their_layout_cuts_them_into(tp: int, cp: int, sp: bool, expected: tuple[int, int]):
    found = pack_multiples(ParallelLayout(tuple(range(tp * cp)), tp=tp, cp=cp), sp)
    assert (found["multiple"], found["sequence_multiple"]) == expected


def test_every_sequence_of_a_pack_is_padded_and_its_tokens_are_found_by_their_slots():
    (packs,) = plan_micro_batches(
        cu(3, 5, 4), torch.arange(3), dp_size=1, max_tokens=24, multiple=8, sequence_multiple=4
    )
    (pack,) = packs
    assert pack.cu_seqlens.tolist() == [0, 4, 12, 16]
    assert pack.token_index.tolist() == list(range(12))
    assert pack.slots is not None and pack.slots.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 12, 13, 14, 15]
    assert (pack.num_padding, pack.num_tokens, pack.max_seqlen) == (4, 16, 8)


def test_padding_of_sequences_counts_against_the_limit_and_dummies_divide_too():
    plan = plan_micro_batches(
        cu(3, 5, 1, 2), torch.arange(4), dp_size=2, max_tokens=8, multiple=8, sequence_multiple=4, fixed_size=True
    )
    for rank in plan:
        for pack in rank:
            assert pack.num_tokens == 8
            assert (pack.cu_seqlens % 4 == 0).all()
            assert pack.slots is not None and pack.slots.numel() == pack.token_index.numel()
    assert sorted(i for rank in plan for pack in rank for i in pack.token_index.tolist()) == list(range(11))


def test_a_rank_without_trajectories_gets_dummies_that_divide():
    plan = plan_micro_batches(cu(3), torch.tensor([0]), dp_size=2, max_tokens=8, multiple=4, sequence_multiple=4)
    assert plan[1][0].cu_seqlens.tolist() == [0, 4]
    assert plan[1][0].slots is not None and plan[1][0].slots.numel() == 0


def test_the_fused_heads_losses_are_those_that_have_a_kernel():
    assert FUSED_LOSSES == SEPARABLE


@pytest.mark.parametrize("feature", ["mtp_num_layers", "use_mup", "defer_embedding_wgrad_compute"])
def test_the_fused_head_refuses_what_uses_logits_or_gradients_behind_its_back(feature: str):
    from asyppo_megatron.models.fused_head import FusedOutputLayer

    original = SimpleNamespace(config=SimpleNamespace(**{feature: 1}))
    with pytest.raises(ValueError, match=f"got {feature}, need none of them"):
        FusedOutputLayer(original, None, None, weight_is_embedding=False)
