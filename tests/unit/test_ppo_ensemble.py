"""The critics' shares, the corrected value and the two masks."""

from __future__ import annotations

import math

import pytest
import torch

from asyppo_megatron.ppo.ensemble import aggregate_values, assign_critics, uncertainty_masks, value_std


def masks_by_sorting(std, valid, k, h):
    """The definition in plain Python: sort valid tokens by (sigma, index), take the first floor(frac n + 1e-9)."""
    tokens = [t for t in range(len(std)) if valid[t]]
    low = sorted(tokens, key=lambda t: (float(std[t]), t))[: math.floor(k * len(tokens) + 1e-9)]
    high = sorted(tokens, key=lambda t: (-float(std[t]), t))[: math.floor(h * len(tokens) + 1e-9)]
    advantage, entropy = valid.clone(), valid.clone()
    advantage[low] = False
    entropy[high] = False
    return advantage, entropy


def test_two_critics_disagree_by_half_their_difference():
    values = torch.tensor([[1.0, 0.0, -2.0], [2.0, 0.0, 2.0]])
    assert torch.equal(aggregate_values(values), torch.tensor([1.5, 0.0, 0.0]))
    assert torch.equal(aggregate_values(values, "min"), torch.tensor([1.0, 0.0, -2.0]))
    assert torch.equal(value_std(values), torch.tensor([0.5, 0.0, 2.0]))


def test_value_std_is_the_population_deviation_of_any_number_of_critics():
    values = torch.randn(5, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(value_std(values), values.std(0, unbiased=False), rtol=1e-13, atol=0)
    assert torch.equal(value_std(values[:1]), torch.zeros(40, dtype=torch.float64))


def test_an_ensemble_without_critics_or_with_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="at least one critic"):
        aggregate_values(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="median"):
        aggregate_values(torch.zeros(2, 3), "median")


def test_masks_take_the_most_agreeing_and_the_most_diverging_tokens():
    std = torch.tensor([0.5, 0.1, 9.0, 0.3, 0.2, 0.4])
    valid = torch.tensor([True, True, False, True, True, True])
    advantage, entropy = uncertainty_masks(std, valid, k=0.4, h=0.2)
    assert advantage.tolist() == [True, False, False, True, False, True]
    assert entropy.tolist() == [False, True, False, True, True, True]


def test_equal_sigma_is_masked_from_the_lower_index_at_both_ends():
    std = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0])
    advantage, entropy = uncertainty_masks(std, torch.ones(5, dtype=torch.bool), k=0.4, h=0.4)
    assert advantage.tolist() == [False, False, True, True, True]
    assert entropy.tolist() == [False, False, True, True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("levels", [3, 50, 10**9])
@pytest.mark.parametrize("k, h", [(0.2, 0.2), (0.0, 0.35), (1.0, 0.0), (0.7, 0.9)])
def test_masks_equal_those_of_a_plain_sort(dtype, levels, k, h):
    generator = torch.Generator().manual_seed(levels)
    std = torch.rand(997, generator=generator, dtype=dtype)
    std = torch.round(std * levels) / levels
    std[::13] = 0.0
    std[5::31] *= 1e-30
    valid = torch.rand(997, generator=generator) < 0.8
    std[~valid] = torch.nan
    expected = masks_by_sorting(std, valid, k, h)
    found = uncertainty_masks(std, valid, k=k, h=h)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 10, 99, 1000, 12345])
@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.1, 0.2, 0.3, 0.6, 0.7, 1.0])
def test_masks_count_exactly_the_rounded_fraction(tokens, fraction):
    std = torch.rand(tokens, generator=torch.Generator().manual_seed(tokens))
    advantage, entropy = uncertainty_masks(std, torch.ones(tokens, dtype=torch.bool), k=fraction, h=fraction)
    expected = math.floor(fraction * tokens + 1e-9)
    assert tokens - int(advantage.sum()) == expected
    assert tokens - int(entropy.sum()) == expected


def test_a_fraction_that_is_a_whole_number_of_tokens_is_not_rounded_down():
    assert 0.29 * 100 < 29
    advantage, _ = uncertainty_masks(torch.rand(100), torch.ones(100, dtype=torch.bool), k=0.29, h=0.0)
    assert int(advantage.sum()) == 71


def test_masks_order_negative_and_signed_zero_scores_like_numbers():
    score = torch.tensor([0.0, -0.0, -1.0, -2.0, 3.0, torch.inf])
    for dtype in (torch.float32, torch.float64):
        advantage, entropy = uncertainty_masks(score.to(dtype), torch.ones(6, dtype=torch.bool), k=0.5, h=0.5)
        assert advantage.tolist() == [False, True, False, False, True, True]
        assert entropy.tolist() == [False, True, True, True, False, False]


def test_masks_of_a_batch_without_valid_tokens_are_false():
    for std, valid in [(torch.rand(4), torch.zeros(4, dtype=torch.bool)), (torch.rand(0), torch.ones(0).bool())]:
        advantage, entropy = uncertainty_masks(std, valid, k=0.2, h=0.2)
        assert not advantage.any() and not entropy.any()


def test_a_fraction_outside_zero_to_one_is_refused():
    with pytest.raises(ValueError, match=r"k: got 1\.1"):
        uncertainty_masks(torch.rand(4), torch.ones(4).bool(), k=1.1, h=0.0)
    with pytest.raises(ValueError, match=r"h: got -0\.1"):
        uncertainty_masks(torch.rand(4), torch.ones(4).bool(), k=0.0, h=-0.1)


def test_every_critic_gets_an_equal_share_of_every_group():
    group_ids = torch.arange(6).repeat_interleave(8)
    critics = assign_critics(group_ids, 4, seed=7, step=3)
    assert critics.dtype == torch.int8
    for group in range(6):
        assert torch.bincount(critics[group_ids == group].long(), minlength=4).tolist() == [2, 2, 2, 2]


def test_shares_are_disjoint_and_cover_the_batch():
    critics = assign_critics(torch.arange(5).repeat_interleave(4), 2, seed=0, step=0)
    shares = torch.stack([critics == m for m in range(2)])
    assert torch.equal(shares.sum(0), torch.ones(20, dtype=torch.long))


def test_shares_do_not_depend_on_the_order_in_which_groups_arrive():
    group_ids = torch.tensor([3, 3, 3, 3, 8, 8, 8, 8, -1, -1, -1, -1])
    expected = assign_critics(group_ids, 2, seed=1, step=5)
    shuffle = torch.tensor([8, 0, 4, 9, 1, 5, 2, 10, 6, 3, 7, 11])  # keeps the order within every group
    found = assign_critics(group_ids[shuffle], 2, seed=1, step=5)
    assert torch.equal(found, expected[shuffle])
    alone = assign_critics(group_ids[4:8], 2, seed=1, step=5)
    assert torch.equal(alone, expected[4:8])


def test_shares_change_with_seed_step_and_group():
    group_ids = torch.arange(2).repeat_interleave(32)
    first = assign_critics(group_ids, 2, seed=1, step=0)
    assert not torch.equal(first, assign_critics(group_ids, 2, seed=2, step=0))
    assert not torch.equal(first, assign_critics(group_ids, 2, seed=1, step=1))
    assert not torch.equal(first[:32], first[32:])
    assert torch.equal(first, assign_critics(group_ids, 2, seed=1, step=0))


def test_over_many_steps_every_response_meets_every_critic_equally_often():
    group_ids = torch.arange(16).repeat_interleave(4)
    critics = torch.stack([assign_critics(group_ids, 2, seed=0, step=step) for step in range(400)])
    frequency = critics.double().mean(0)
    assert (frequency - 0.5).abs().max() < 4.5 * 0.5 / math.sqrt(400)


def test_shares_stay_those_of_earlier_versions():
    critics = assign_critics(torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), 2, seed=42, step=1)
    assert critics.tolist() == [0, 1, 1, 0, 1, 0, 1, 0]


def test_a_group_that_does_not_divide_is_refused_by_default():
    with pytest.raises(ValueError, match=r"group of 5 responses.*multiple of 2"):
        assign_critics(torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1]), 2, seed=0, step=0)


def test_rotate_gives_the_remainder_to_each_critic_in_turn():
    group_ids = torch.zeros(5, dtype=torch.long)
    total = torch.zeros(3, dtype=torch.long)
    for step in range(3):
        counts = torch.bincount(assign_critics(group_ids, 3, seed=0, step=step, remainder="rotate").long(), minlength=3)
        assert sorted(counts.tolist()) == [1, 2, 2]
        total += counts
    assert total.tolist() == [5, 5, 5]


def test_drop_leaves_the_remainder_to_no_critic():
    critics = assign_critics(torch.tensor([0] * 5 + [1] * 2), 3, seed=0, step=0, remainder="drop")
    assert sorted(critics[:5].tolist()) == [-1, -1, 0, 1, 2]
    assert critics[5:].tolist() == [-1, -1]


def test_an_empty_batch_has_no_shares():
    assert assign_critics(torch.zeros(0, dtype=torch.long), 2, seed=0, step=0).shape == (0,)


def test_huge_seeds_are_accepted():
    assign_critics(torch.zeros(4, dtype=torch.long), 2, seed=2**80 + 3, step=0)
    with pytest.raises(ValueError, match="num_critics"):
        assign_critics(torch.zeros(4, dtype=torch.long), 0, seed=0, step=0)
    with pytest.raises(ValueError, match="remainder"):
        assign_critics(torch.zeros(4, dtype=torch.long), 2, seed=0, step=0, remainder="pad")
