"""From a batch and its scores to targets and metrics."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest
import torch

from asyppo_megatron.ppo.advantages import gae, group_advantages, terminal_rewards
from asyppo_megatron.ppo.ensemble import uncertainty_masks, value_std
from asyppo_megatron.ppo.losses import policy_loss
from asyppo_megatron.ppo.targets import checksum, compute_targets, monte_carlo_returns
from asyppo_megatron.types import PackedBatch, Scores

F64 = torch.float64
TENSORS = ("old_logprobs", "advantages", "returns", "advantage_mask", "entropy_mask")


def make_batch(sizes, mask, rewards, groups, rollout_logprobs=None, dtype=torch.float32):
    total = sum(sizes)
    mask = torch.tensor(mask, dtype=torch.bool) if not isinstance(mask, torch.Tensor) else mask
    return PackedBatch(
        step=0,
        policy_version=0,
        tokens=torch.zeros(total, dtype=torch.int32),
        cu_seqlens=torch.tensor([0, *sizes]).cumsum(0).to(torch.int32),
        loss_mask=mask,
        rollout_logprobs=torch.zeros(total, dtype=dtype) if rollout_logprobs is None else rollout_logprobs,
        rewards=torch.as_tensor(rewards, dtype=dtype),
        group_ids=torch.tensor(groups, dtype=torch.long),
        truncated=torch.zeros(len(sizes), dtype=torch.bool),
    )


def random_case(seed=0, sizes=(9, 4, 12, 7), critics=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    total = sum(sizes)
    mask = torch.rand(total, generator=generator) < 0.8
    old = -2 * torch.rand(total, generator=generator, dtype=dtype)
    rollout = torch.where(mask, old + 0.1 * torch.randn(total, generator=generator, dtype=dtype), 0)
    values = torch.randn(critics, total, generator=generator, dtype=dtype)
    reference = old + 0.2 * torch.randn(total, generator=generator, dtype=dtype)
    rewards = torch.rand(len(sizes), generator=generator, dtype=dtype)
    batch = make_batch(sizes, mask, rewards, [0, 0, 1, 1], rollout, dtype)
    return batch, Scores(old_logprobs=old, values=values, reference_logprobs=reference)


def test_asyppo_targets_by_hand():
    batch = make_batch([4, 3], [0, 1, 1, 0, 1, 1, 0], [1.0, 0.0], [0, 0])
    values = torch.tensor([[9.0, 0.2, 0.4, 9.0, 0.1, 0.6, 9.0], [-9.0, 0.4, 0.8, 9.0, 0.3, 0.0, 9.0]])
    targets = compute_targets(batch, Scores(torch.zeros(7), values), k=0.25, h=0.25)
    torch.testing.assert_close(targets.advantages, torch.tensor([0, 0.7, 0.4, 0, -0.2, -0.3, 0]))
    assert targets.returns.tolist() == [0, 1, 1, 0, 0, 0, 0]
    # sigma = 0.1, 0.2, 0.1, 0.3: the first of the lowest two, and the highest.
    assert targets.advantage_mask.tolist() == [False, False, True, False, True, True, False]
    assert targets.entropy_mask.tolist() == [False, True, True, False, True, False, False]
    metrics = {name: float(value) for name, value in targets.metrics.items()}
    assert metrics == pytest.approx(
        {
            "value_std": 0.175,
            "advantage_mean": 0.15,
            "advantage_std": math.sqrt((0.55**2 + 0.25**2 + 0.35**2 + 0.45**2) / 4),
            "return_mean": 0.5,
            "masked_advantage_fraction": 0.25,
            "masked_entropy_fraction": 0.25,
            "mismatch_mean": 0.0,
            "mismatch_max": 0.0,
            "mismatch_k3_kl": 0.0,
            "mismatch_ess": 1.0,
        },
        rel=1e-6,
    )


def test_targets_are_those_of_the_library_functions():
    batch, scores = random_case()
    targets = compute_targets(batch, scores, gamma=0.99, lam=0.95, k=0.2, h=0.3)
    rewards = terminal_rewards(batch.rewards, batch.loss_mask, batch.cu_seqlens)
    expected = gae(rewards, scores.values.mean(0), batch.loss_mask, batch.cu_seqlens, gamma=0.99, lam=0.95)
    masks = uncertainty_masks(value_std(scores.values), batch.loss_mask, k=0.2, h=0.3)
    assert torch.equal(targets.advantages, expected[0]) and torch.equal(targets.returns, expected[1])
    assert torch.equal(targets.advantage_mask, masks[0]) and torch.equal(targets.entropy_mask, masks[1])


def test_one_critic_without_masks_and_bonus_is_classic_ppo_to_the_bit():
    batch, scores = random_case(critics=1)
    targets = compute_targets(batch, scores, k=0.0, h=0.0)
    mask, cus = batch.loss_mask, batch.cu_seqlens.tolist()
    value = scores.values[0]
    advantage, weight = torch.zeros_like(value), torch.zeros_like(value)
    for n, (start, end) in enumerate(pairwise(cus)):
        tokens = torch.arange(start, end)[mask[start:end]]
        advantage[tokens] = batch.rewards[n] - value[tokens]  # gamma = lambda = 1
        weight[tokens] = len(tokens)
    new = scores.old_logprobs + 0.3 * torch.sin(torch.arange(32.0))
    classic_input = new.clone().requires_grad_()
    ratio = torch.exp(classic_input[mask] - scores.old_logprobs[mask])
    surrogate = torch.min(ratio * advantage[mask], torch.clamp(ratio, 0.8, 1.2) * advantage[mask])
    per_token = torch.zeros(32).masked_scatter(mask, -surrogate / weight[mask])
    classic = per_token.sum() / 4
    classic.backward()
    ours_input = new.clone().requires_grad_()
    total, count = policy_loss(
        ours_input,
        torch.rand(32),
        targets.old_logprobs,
        targets.advantages,
        mask,
        batch.cu_seqlens,
        advantage_mask=targets.advantage_mask,
        entropy_mask=targets.entropy_mask,
        entropy_coef=0.0,
    )
    (total / count).backward()
    assert torch.equal(targets.advantages, advantage)
    assert torch.equal(total / count, classic)
    assert torch.equal(ours_input.grad, classic_input.grad)


def test_nothing_outside_the_loss_mask_reaches_the_targets():
    for options in (
        {"k": 0.3, "h": 0.2, "importance": "truncated", "whiten": True, "kl_coef": 0.1},
        {"advantage": "grpo", "importance": "masked", "kl_coef": 0.1},
    ):
        batch, scores = random_case()
        mask = batch.loss_mask
        expected = compute_targets(batch, scores, **options)
        spoiled = Scores(*(torch.where(mask, x, torch.nan) for x in dataclasses.astuple(scores)))
        rollout = torch.where(mask, batch.rollout_logprobs, torch.inf)
        found = compute_targets(dataclasses.replace(batch, rollout_logprobs=rollout), spoiled, **options)
        for name in (*TENSORS, "reference_logprobs"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
            assert not getattr(found, name)[~mask].any()
        assert found.metrics == expected.metrics
        assert all(value.isfinite() for value in found.metrics.values())


@pytest.mark.parametrize("how", ["grpo", "dr_grpo", "rloo"])
def test_group_methods_give_every_token_its_trajectorys_advantage(how):
    batch, scores = random_case(critics=0)
    targets = compute_targets(batch, scores, advantage=how)
    sequence = group_advantages(batch.rewards, batch.group_ids, how)
    expected = sequence.repeat_interleave(torch.tensor([9, 4, 12, 7])) * batch.loss_mask
    assert torch.equal(targets.advantages, expected)
    assert torch.equal(targets.returns, monte_carlo_returns(batch, 1.0))
    assert torch.equal(targets.advantage_mask, batch.loss_mask)


def test_missing_scores_and_unknown_names_are_refused():
    batch, scores = random_case(critics=0)
    bare = dataclasses.replace(scores, reference_logprobs=None)
    with pytest.raises(ValueError, match="at least one critic"):
        compute_targets(batch, scores)
    with pytest.raises(ValueError, match="critics that can disagree"):
        compute_targets(batch, scores, advantage="grpo", k=0.2)
    with pytest.raises(ValueError, match="reference_logprobs"):
        compute_targets(batch, bare, advantage="grpo", kl_coef=0.1)
    with pytest.raises(ValueError, match="vtrace"):
        compute_targets(batch, scores, advantage="vtrace")
    with pytest.raises(ValueError, match="sometimes"):
        compute_targets(batch, scores, advantage="grpo", importance="sometimes")


def test_monte_carlo_returns_discount_over_trainable_tokens():
    batch = make_batch([5, 2], [1, 0, 1, 1, 0, 0, 0], [8.0, 3.0], [0, 0])
    assert monte_carlo_returns(batch, 1.0).tolist() == [8, 0, 8, 8, 0, 0, 0]
    assert monte_carlo_returns(batch, 0.5).tolist() == [2, 0, 4, 8, 0, 0, 0]


def test_the_critics_may_have_their_own_lambda():
    batch, scores = random_case()
    targets = compute_targets(batch, scores, lam=0.9, critic_lam=1.0)
    torch.testing.assert_close(targets.returns, monte_carlo_returns(batch, 1.0))
    assert torch.equal(targets.advantages, compute_targets(batch, scores, lam=0.9).advantages)


def test_min_aggregation_uses_the_smaller_value():
    batch, scores = random_case(dtype=F64)
    targets = compute_targets(batch, scores, value_aggregate="min")
    returns = monte_carlo_returns(batch, 1.0)
    torch.testing.assert_close(targets.advantages, (returns - scores.values.amin(0)) * batch.loss_mask)


def test_importance_weights_multiply_the_advantages():
    old = torch.log(torch.tensor([1.5, 3.0, 0.5, 1.0]))
    batch = make_batch([4], [1, 1, 1, 0], [1.0], [0])
    scores = Scores(old, torch.zeros(1, 4))
    by_kind = {
        kind: compute_targets(batch, scores, importance=kind, importance_cap=2.0).advantages
        for kind in ("none", "truncated", "masked")
    }
    torch.testing.assert_close(by_kind["none"], torch.tensor([1.0, 1.0, 1.0, 0.0]))
    torch.testing.assert_close(by_kind["truncated"], torch.tensor([1.5, 2.0, 0.5, 0.0]))
    torch.testing.assert_close(by_kind["masked"], torch.tensor([1.5, 0.0, 0.5, 0.0]))
    metrics = compute_targets(batch, scores).metrics
    assert float(metrics["mismatch_max"]) == pytest.approx(math.log(3.0))
    assert float(metrics["mismatch_mean"]) == pytest.approx((math.log(1.5) + math.log(3) + math.log(2)) / 3)
    assert float(metrics["mismatch_ess"]) == pytest.approx(5.0**2 / (3 * (1.5**2 + 3.0**2 + 0.5**2)))
    k3 = sum(w - 1 - math.log(w) for w in (1.5, 3.0, 0.5)) / 3
    assert float(metrics["mismatch_k3_kl"]) == pytest.approx(k3, rel=1e-6)


def test_whitened_advantages_have_mean_zero_and_deviation_one():
    batch, scores = random_case(dtype=F64)
    plain = compute_targets(batch, scores)
    whitened = compute_targets(batch, scores, whiten=True)
    assert float(whitened.metrics["advantage_mean"]) == pytest.approx(0.0, abs=1e-12)
    assert float(whitened.metrics["advantage_std"]) == pytest.approx(1.0, rel=1e-7)
    a = plain.advantages[batch.loss_mask]
    expected = (a - a.mean()) / (a.std(unbiased=False) + 1e-8)
    torch.testing.assert_close(whitened.advantages[batch.loss_mask], expected, rtol=1e-12, atol=1e-12)


def test_a_kl_penalty_is_taken_off_the_reward_of_every_token():
    batch = make_batch([4], [1, 1, 1, 0], [1.0], [0], dtype=F64)
    old, reference = torch.tensor([-1.0, -1.0, -2.0, 0.0], dtype=F64), torch.tensor([-2.0, -1.0, -1.0, 0.0], dtype=F64)
    targets = compute_targets(batch, Scores(old, torch.zeros(1, 4, dtype=F64), reference), kl_coef=0.1)
    torch.testing.assert_close(targets.returns, torch.tensor([1.0, 1.1, 1.1, 0.0], dtype=F64))
    groups = make_batch([2, 2], [1, 0, 1, 0], [1.0, 1.0], [0, 0], dtype=F64)
    reference = torch.tensor([-2.0, 0.0, -1.0, 0.0], dtype=F64)
    old = torch.tensor([-1.0, 0.0, -1.0, 0.0], dtype=F64)
    scores = Scores(old, torch.zeros(0, 4, dtype=F64), reference)
    targets = compute_targets(groups, scores, advantage="dr_grpo", kl_coef=0.1)
    torch.testing.assert_close(targets.advantages, torch.tensor([-0.05, 0.0, 0.05, 0.0], dtype=F64))


@pytest.mark.parametrize("sizes, mask", [([], []), ([2, 1], [0, 0, 0])])
def test_a_batch_without_trainable_tokens_has_zero_targets(sizes, mask):
    batch = make_batch(sizes, mask, [1.0] * len(sizes), [0] * len(sizes))
    scores = Scores(torch.full((len(mask),), torch.nan), torch.full((2, len(mask)), torch.nan))
    for options in ({"k": 0.2, "h": 0.2, "whiten": True}, {"advantage": "grpo"}):
        targets = compute_targets(batch, scores, **options)
        for name in TENSORS:
            assert not getattr(targets, name).any()
        assert all(float(value) == 0.0 for value in targets.metrics.values())
        assert int(checksum(targets)) == 0


def test_float64_scores_are_computed_in_float64():
    batch, scores = random_case(dtype=F64)
    targets = compute_targets(batch, scores, whiten=True, importance="truncated", kl_coef=0.1)
    assert targets.advantages.dtype == targets.returns.dtype == targets.old_logprobs.dtype == F64
