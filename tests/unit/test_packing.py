"""Mini-batches and packed micro-batches: every token once, balanced, within bounds, the same everywhere."""

from __future__ import annotations

import time
from itertools import chain

import pytest
import torch

from asyppo_megatron.packing import mini_batches, plan_micro_batches


def cu(*sizes):
    return torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)


def random_sizes(count, low, high, seed=0):
    return torch.randint(low, high + 1, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def check_plan(plan, sizes, indices, dp_size, max_tokens, multiple=1, fixed_size=False):
    """Everything that a plan promises."""
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    assert len(plan) == dp_size
    assert len({len(rank) for rank in plan}) == 1 and len(plan[0]) >= 1
    packs = [pack for rank in plan for pack in rank]
    assert sorted(i for pack in packs for i in pack.trajectories.tolist()) == sorted(indices)
    for pack in packs:
        chosen = pack.trajectories.tolist()
        expected = [t for i in chosen for t in range(starts[i], starts[i + 1])]
        assert pack.token_index.tolist() == expected
        assert pack.token_index.dtype == torch.long and pack.cu_seqlens.dtype == torch.int32
        lengths = (pack.cu_seqlens[1:] - pack.cu_seqlens[:-1]).tolist()
        real = [sizes[i] for i in chosen]
        assert lengths[: len(real)] == real and min(lengths) >= 1
        assert sum(lengths[len(real) :]) == pack.num_padding
        assert sum(lengths) == pack.num_tokens > 0
        assert pack.num_tokens % multiple == 0
        assert pack.max_seqlen == max(lengths)
        assert max(lengths[len(real) :], default=0) <= max(real or sizes or [multiple])
        if len(real) > 1:
            assert -(-sum(real) // multiple) * multiple <= max_tokens
        if not fixed_size and real:
            assert pack.num_padding < multiple
    if fixed_size:
        assert len({pack.num_tokens for pack in packs}) == 1


def test_two_ranks_share_four_trajectories_by_hand():
    plan = plan_micro_batches(cu(4, 3, 2, 1), torch.arange(4), dp_size=2, max_tokens=5)
    assert [[pack.trajectories.tolist() for pack in rank] for rank in plan] == [[[0, 3]], [[1, 2]]]
    assert plan[0][0].token_index.tolist() == [0, 1, 2, 3, 9]
    assert plan[0][0].cu_seqlens.tolist() == [0, 4, 5]
    assert plan[1][0].token_index.tolist() == [4, 5, 6, 7, 8]
    assert plan[1][0].max_seqlen == 3


def test_padding_is_dummy_sequences_no_longer_than_the_longest_real_one():
    plan = plan_micro_batches(cu(2, 1, 5), torch.tensor([0, 1, 2]), dp_size=1, max_tokens=8, multiple=8)
    assert [pack.cu_seqlens.tolist() for pack in plan[0]] == [[0, 2, 3, 8]]
    plan = plan_micro_batches(cu(2, 1), torch.tensor([0, 1]), dp_size=1, max_tokens=8, multiple=8)
    assert plan[0][0].cu_seqlens.tolist() == [0, 2, 3, 5, 7, 8]
    assert plan[0][0].num_padding == 5


def test_a_trajectory_longer_than_a_pack_travels_alone():
    plan = plan_micro_batches(cu(3, 50, 4), torch.arange(3), dp_size=1, max_tokens=8)
    assert [pack.trajectories.tolist() for pack in plan[0]] == [[1], [0, 2]]


def test_a_rank_without_trajectories_gets_packs_of_dummies():
    plan = plan_micro_batches(cu(6), torch.tensor([0]), dp_size=3, max_tokens=8, multiple=4)
    check_plan(plan, [6], [0], 3, 8, multiple=4)
    assert [rank[0].num_tokens for rank in plan] == [8, 4, 4]
    assert plan[1][0].trajectories.numel() == plan[1][0].token_index.numel() == 0


@pytest.mark.parametrize("dp_size", [1, 2])
def test_balance_never_costs_another_pack(dp_size):
    # Levelling would put 5 + 2 + 2 into one pack of 8 and need a third.
    sizes = [5, 4, 3, 2, 2]
    plan = plan_micro_batches(cu(*sizes), torch.arange(5), dp_size=dp_size, max_tokens=8)
    check_plan(plan, sizes, range(5), dp_size, 8)
    assert sorted(pack.trajectories.tolist() for rank in plan for pack in rank) == [[0, 2], [1, 3, 4]]


@pytest.mark.parametrize("seed", range(40))
def test_small_tight_plans_keep_their_promises(seed):
    sizes = random_sizes(3 + seed % 7, 1, 8, seed)
    for dp_size in (1, 2, 3):
        for fixed_size in (False, True):
            options = {"dp_size": dp_size, "max_tokens": 8, "fixed_size": fixed_size}
            plan = plan_micro_batches(cu(*sizes), torch.arange(len(sizes)), **options)
            check_plan(plan, sizes, range(len(sizes)), **options)


def test_an_empty_mini_batch_is_planned_as_dummies():
    for fixed_size in (False, True):
        none = torch.zeros(0, dtype=torch.long)
        plan = plan_micro_batches(cu(3, 4), none, dp_size=2, max_tokens=8, multiple=2, fixed_size=fixed_size)
        assert [[pack.num_tokens for pack in rank] for rank in plan] == [[2], [2]]
        assert plan_micro_batches(cu(), none, dp_size=1, max_tokens=1)[0][0].num_tokens == 1


@pytest.mark.parametrize("fixed_size", [False, True])
@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("dp_size", [1, 3, 8])
@pytest.mark.parametrize(
    "count, low, high, max_tokens",
    [(1, 5, 5, 64), (7, 1, 90, 64), (60, 20, 40, 64), (100, 1, 64, 64), (90, 33, 50, 99)],
)
def test_every_plan_keeps_its_promises(count, low, high, max_tokens, dp_size, multiple, fixed_size):
    sizes = random_sizes(count + 5, low, high, seed=count)
    indices = torch.randperm(count + 5, generator=torch.Generator().manual_seed(1))[:count]
    options = {"dp_size": dp_size, "max_tokens": max_tokens, "multiple": multiple, "fixed_size": fixed_size}
    plan = plan_micro_batches(cu(*sizes), indices, **options)
    check_plan(plan, sizes, indices.tolist(), **options)


def test_planning_twice_gives_the_same_packs():
    sizes = random_sizes(40, 1, 60)
    first, second = (plan_micro_batches(cu(*sizes), torch.arange(40), dp_size=4, max_tokens=80) for _ in range(2))
    for a, b in zip(chain(*first), chain(*second), strict=True):
        assert torch.equal(a.trajectories, b.trajectories) and torch.equal(a.cu_seqlens, b.cu_seqlens)


def test_tokens_are_balanced_over_ranks_and_packs_are_well_filled():
    sizes = random_sizes(2048, 200, 9216)
    plan = plan_micro_batches(cu(*sizes), torch.arange(2048), dp_size=16, max_tokens=16384)
    loads = [sum(pack.token_index.numel() for pack in rank) for rank in plan]
    assert max(loads) < 1.001 * sum(loads) / 16
    assert len(plan[0]) <= 1.05 * sum(sizes) / (16 * 16384) + 1


def test_no_rank_idles_while_another_has_two_trajectories_in_one_pack():
    plan = plan_micro_batches(cu(*[10] * 6), torch.arange(6), dp_size=4, max_tokens=20)
    assert sorted(pack.trajectories.numel() for rank in plan for pack in rank) == [1, 1, 2, 2]


def test_planning_sixteen_thousand_trajectories_is_quick():
    sizes = random_sizes(16384, 10, 1000)
    start = time.process_time()
    plan_micro_batches(cu(*sizes), torch.arange(16384), dp_size=8, max_tokens=16384)
    assert time.process_time() - start < 5.0


def test_impossible_packs_are_refused():
    with pytest.raises(ValueError, match="max_tokens: got 3, need at least 4"):
        plan_micro_batches(cu(1), torch.tensor([0]), dp_size=1, max_tokens=3, multiple=4)
    with pytest.raises(ValueError, match="dp_size"):
        plan_micro_batches(cu(1), torch.tensor([0]), dp_size=0, max_tokens=3)


def test_one_mini_batch_keeps_the_natural_order():
    for size in (6, 100):
        batches = mini_batches(6, size, seed=0, step=0, epoch=0)
        assert [b.tolist() for b in batches] == [[0, 1, 2, 3, 4, 5]]


def test_mini_batches_cover_the_batch_once_in_a_shuffled_order():
    batches = mini_batches(64, 16, seed=0, step=0, epoch=0)
    assert [len(b) for b in batches] == [16] * 4
    order = torch.cat(batches)
    assert sorted(order.tolist()) == list(range(64)) != order.tolist()


def test_mini_batches_change_with_seed_step_and_epoch_and_with_nothing_else():
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    orders = [torch.cat(mini_batches(64, 16, seed=a, step=b, epoch=c)).tolist() for a, b, c in keys]
    assert len({tuple(order) for order in orders}) == 4
    assert torch.cat(mini_batches(64, 16, seed=0, step=0, epoch=0)).tolist() == orders[0]


def test_mini_batches_that_do_not_divide_differ_by_one_trajectory_at_most():
    assert sorted(len(b) for b in mini_batches(10, 4, seed=0, step=0, epoch=0)) == [3, 3, 4]
    with pytest.raises(ValueError, match="mini_batch_size"):
        mini_batches(10, 0, seed=0, step=0, epoch=0)
