"""Token rewards, GAE over packed sequences, and group advantages."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from asyppo_megatron.ppo.advantages import gae, group_advantages, length_adaptive_lambda, terminal_rewards

F64 = torch.float64


def cu(*sizes):
    return torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)


def bools(*bits):
    return torch.tensor(bits, dtype=torch.bool)


def naive_gae(rewards, values, mask, cu_seqlens, gamma, lams):
    """GAE by its definition, the sum over l of (gamma lambda)^l delta_{t+l}, one sequence and token at a time."""
    advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
    for n in range(len(cu_seqlens) - 1):
        tokens = [t for t in range(int(cu_seqlens[n]), int(cu_seqlens[n + 1])) if mask[t]]
        deltas = []
        for i, t in enumerate(tokens):
            following = values[tokens[i + 1]] if i + 1 < len(tokens) else 0.0
            deltas.append(rewards[t] + gamma * following - values[t])
        for i, t in enumerate(tokens):
            advantages[t] = sum((gamma * lams[n]) ** (j - i) * deltas[j] for j in range(i, len(tokens)))
            returns[t] = advantages[t] + values[t]
    return advantages, returns


def random_case(seed, sizes, keep=0.7, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    total = sum(sizes)
    mask = torch.rand(total, generator=generator) < keep
    rewards = torch.randn(total, generator=generator, dtype=dtype)
    values = torch.randn(total, generator=generator, dtype=dtype)
    return rewards, values, mask, cu(*sizes)


def test_the_reward_lands_on_the_last_generated_action():
    mask = bools(0, 1, 1, 0, 1, 0, 0, 1, 0, 0)
    result = terminal_rewards(torch.tensor([2.0, 3.0, 5.0]), mask, cu(4, 3, 3))
    assert result.tolist() == [0, 0, 2, 0, 3, 0, 0, 5, 0, 0]


def test_a_trajectory_without_trainable_tokens_gets_no_reward():
    mask = bools(0, 0, 1, 1, 0, 0, 0)
    result = terminal_rewards(torch.tensor([7.0, 3.0, torch.nan]), mask, cu(2, 3, 2))
    assert result.tolist() == [0, 0, 0, 3, 0, 0, 0]


def test_terminal_rewards_keep_float64_and_accept_an_empty_batch():
    assert terminal_rewards(torch.zeros(1, dtype=F64), bools(1), cu(1)).dtype == F64
    assert terminal_rewards(torch.zeros(0), bools(), cu()).shape == (0,)
    assert terminal_rewards(torch.zeros(1), bools(), cu(0)).shape == (0,)


def test_undiscounted_gae_is_the_reward_minus_the_value():
    mask = bools(0, 1, 1, 1, 0)
    rewards = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0])
    values = torch.tensor([9.0, 0.25, 0.5, 0.75, 9.0])
    advantages, returns = gae(rewards, values, mask, cu(5), gamma=1.0, lam=1.0)
    assert advantages.tolist() == [0, 0.75, 0.5, 0.25, 0]
    assert returns.tolist() == [0, 1, 1, 1, 0]


def test_gae_of_three_tokens_computed_by_hand():
    # gamma = lambda = 1/2: deltas 0.5*0.5-1=-0.75, 0.5*0.25-0.5=-0.375, 1-0.25=0.75; A_3=0.75,
    # A_2=-0.375+0.25*0.75=-0.1875, A_1=-0.75+0.25*-0.1875=-0.796875.
    advantages, returns = gae(
        torch.tensor([0.0, 0.0, 1.0]), torch.tensor([1.0, 0.5, 0.25]), bools(1, 1, 1), cu(3), gamma=0.5, lam=0.5
    )
    assert advantages.tolist() == [-0.796875, -0.1875, 0.75]
    assert returns.tolist() == [0.203125, 0.3125, 1.0]


def test_lambda_zero_is_the_one_step_error():
    rewards, values, mask, cus = random_case(3, [6], keep=1.0)
    advantages, _ = gae(rewards, values, mask, cus, gamma=0.9, lam=0.0)
    following = torch.cat([values[1:], torch.zeros(1, dtype=F64)])
    torch.testing.assert_close(advantages, rewards + 0.9 * following - values, rtol=0, atol=1e-14)


@pytest.mark.parametrize("gamma, lam", [(1.0, 1.0), (1.0, 0.95), (0.99, 0.9), (0.0, 0.5), (0.7, 0.0)])
def test_gae_skips_masked_tokens(gamma, lam):
    sizes = [5, 1, 17, 2, 9, 17, 1]
    rewards, values, mask, cus = random_case(11, sizes)
    mask[5] = False  # a sequence without a trainable token
    expected = naive_gae(rewards, values, mask, cus, gamma, [lam] * len(sizes))
    found = gae(rewards, values, mask, cus, gamma=gamma, lam=lam)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_each_sequence_may_have_its_own_lambda():
    sizes = [8, 3, 12]
    rewards, values, mask, cus = random_case(5, sizes)
    lams = torch.tensor([0.2, 1.0, 0.9], dtype=F64)
    expected = naive_gae(rewards, values, mask, cus, 0.98, lams.tolist())
    found = gae(rewards, values, mask, cus, gamma=0.98, lam=lams)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-13)


def test_a_sequence_has_the_same_bits_alone_and_in_a_batch():
    sizes = [40, 7, 23]
    rewards, values, mask, cus = random_case(2, sizes, dtype=torch.float32)
    whole = gae(rewards, values, mask, cus, gamma=0.99, lam=0.97)
    for start, end in pairwise(cus.tolist()):
        part = slice(start, end)
        alone = gae(rewards[part], values[part], mask[part], cu(end - start), gamma=0.99, lam=0.97)
        assert torch.equal(whole[0][part], alone[0])
        assert torch.equal(whole[1][part], alone[1])


def test_nothing_outside_the_mask_reaches_gae():
    rewards, values, mask, cus = random_case(8, [9, 4, 6])
    expected = gae(rewards, values, mask, cus, gamma=0.99, lam=0.9)
    rewards[~mask], values[~mask] = torch.nan, torch.inf
    found = gae(rewards, values, mask, cus, gamma=0.99, lam=0.9)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert not found[0][~mask].any() and not found[1][~mask].any()


def test_float32_gae_is_accurate_over_eight_thousand_tokens():
    rewards, values, mask, cus = random_case(4, [8192, 5000], dtype=torch.float32)
    rewards *= 1e-3
    for gamma, lam in [(1.0, 1.0), (1.0, 0.999), (0.999, 0.95)]:
        found = gae(rewards, values, mask, cus, gamma=gamma, lam=lam)[0]
        exact = gae(rewards.double(), values.double(), mask, cus, gamma=gamma, lam=lam)[0]
        assert found.dtype == torch.float32 and exact.dtype == F64
        assert (found - exact).abs().max() < 1e-6


def test_gae_of_nothing_is_nothing():
    for sizes in ([], [0], [0, 0]):
        advantages, returns = gae(torch.zeros(0), torch.zeros(0), bools(), cu(*sizes), gamma=1.0, lam=1.0)
        assert advantages.shape == returns.shape == (0,)
    advantages, returns = gae(torch.ones(3), torch.ones(3), bools(0, 0, 0), cu(2, 0, 1), gamma=1.0, lam=1.0)
    assert advantages.tolist() == returns.tolist() == [0, 0, 0]


def test_lambda_adapts_to_the_length_of_the_response():
    mask = torch.cat([torch.zeros(10), torch.ones(100), torch.ones(20), torch.zeros(5), torch.ones(40)]).bool()
    lam = length_adaptive_lambda(mask, cu(110, 20, 5, 40))
    torch.testing.assert_close(lam, torch.tensor([0.8, 0.0, 0.0, 0.5]))


def test_group_advantages_by_hand():
    rewards, groups = torch.tensor([1.0, 0.0, 0.0, 1.0, 5.0, 2.0, 2.0]), torch.tensor([4, 4, 4, 4, 9, 9, 9])
    assert group_advantages(rewards, groups, "dr_grpo").tolist() == [0.5, -0.5, -0.5, 0.5, 2.0, -1.0, -1.0]
    torch.testing.assert_close(
        group_advantages(rewards, groups, "rloo"), torch.tensor([2 / 3, -2 / 3, -2 / 3, 2 / 3, 3.0, -1.5, -1.5])
    )
    std = (1 / 3) ** 0.5, 3**0.5  # sample deviations
    expected = [0.5 / (std[0] + 1e-6) * s for s in (1, -1, -1, 1)] + [x / (std[1] + 1e-6) for x in (2, -1, -1)]
    torch.testing.assert_close(group_advantages(rewards, groups, "grpo"), torch.tensor(expected))


@pytest.mark.parametrize("how", ["grpo", "dr_grpo", "rloo"])
def test_equal_rewards_give_exactly_zero(how):
    rewards = torch.full((21,), 0.1).double() + 0.123456789
    groups = torch.arange(3).repeat(7)
    assert torch.equal(group_advantages(rewards, groups, how), torch.zeros(21, dtype=F64))
    assert torch.equal(group_advantages(rewards.float(), groups, how), torch.zeros(21))


@pytest.mark.parametrize("how", ["grpo", "dr_grpo", "rloo"])
def test_group_advantages_follow_their_definition_in_any_order(how):
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(60, generator=generator, dtype=F64)
    groups = torch.randint(-3, 4, (60,), generator=generator) * 1000
    expected = torch.zeros_like(rewards)
    for group in groups.unique():
        r = rewards[groups == group]
        baseline = (r.sum() - r) / (len(r) - 1) if how == "rloo" else r.mean()
        expected[groups == group] = (r - baseline) / (r.std() + 1e-6 if how == "grpo" else 1.0)
    torch.testing.assert_close(group_advantages(rewards, groups, how), expected, rtol=1e-12, atol=1e-13)


def test_a_group_of_one_has_no_advantage():
    for how in ("grpo", "dr_grpo", "rloo"):
        assert group_advantages(torch.tensor([3.0]), torch.tensor([0]), how).tolist() == [0.0]
        assert group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.long), how).shape == (0,)
    with pytest.raises(ValueError, match="reinforce"):
        group_advantages(torch.zeros(2), torch.zeros(2, dtype=torch.long), "reinforce")
