"""Dense rewards on their way from a response to returns and advantages, against float64 written out in loops."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from asyppo_megatron.ppo.targets import batch_rewards, compute_targets, monte_carlo_returns
from asyppo_megatron.types import PackedBatch, Scores, Trajectory, pack_trajectories


def trajectory(prompt: int, response: int, reward: float, group: int, dense: list[float] | None) -> Trajectory:
    return Trajectory(
        prompt_id="p",
        group=group,
        sample=0,
        prompt_tokens=np.arange(prompt, dtype=np.int32),
        response_tokens=np.arange(100, 100 + response, dtype=np.int32),
        rollout_logprobs=np.full(response, -1.0, dtype=np.float32),
        reward=reward,
        finish_reason="stop",
        policy_version=0,
        token_rewards=None if dense is None else np.array(dense, dtype=np.float32),
    )


def to_batch(trajectories: list[Trajectory], dtype: torch.dtype = torch.float32) -> PackedBatch:
    arrays = {n: torch.tensor(a) for n, a in pack_trajectories(trajectories, 0).items()}
    names = {f.name for f in dataclasses.fields(PackedBatch)}
    batch = PackedBatch(step=0, policy_version=0, **{n: a for n, a in arrays.items() if n in names})
    dense = None if batch.token_rewards is None else batch.token_rewards.to(dtype)
    return dataclasses.replace(batch, rewards=batch.rewards.to(dtype), token_rewards=dense)


def random_trajectories(seed: int = 0) -> list[Trajectory]:
    rng = np.random.default_rng(seed)
    found = []
    for i in range(6):
        length = int(rng.integers(1, 9))
        dense = None if i == 2 else rng.normal(size=length).round(3).tolist()
        found.append(trajectory(int(rng.integers(1, 5)), length, float(rng.integers(0, 2)), i // 3, dense))
    return found


def test_a_tokens_reward_stands_at_the_position_whose_action_it_is():
    arrays = pack_trajectories([trajectory(2, 3, 1.0, 0, [0.5, 0.0, -1.0]), trajectory(1, 2, 0.0, 0, None)], 0)
    # Tokens p p r r r | p r r: the action of a position is the next token.
    assert arrays["loss_mask"].tolist() == [0, 1, 1, 1, 0, 1, 1, 0]
    assert arrays["token_rewards"].tolist() == [0, 0.5, 0, -1, 0, 0, 0, 0]
    assert arrays["token_rewards"].dtype == np.float32
    batch = to_batch([trajectory(2, 3, 1.0, 0, [0.5, 0.0, -1.0])])
    assert batch_rewards(batch).tolist() == [0, 0.5, 0, 0, 0], "the terminal reward adds to the last token's"
    assert monte_carlo_returns(batch, 1.0).tolist() == [0, 0.5, 0, 0, 0]


def test_a_batch_without_dense_rewards_carries_none():
    assert "token_rewards" not in pack_trajectories([trajectory(2, 3, 1.0, 0, None)], 0)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.97, 0.9)])
def test_returns_and_advantages_are_those_of_the_definition(gamma, lam):
    trajectories = random_trajectories()
    generator = torch.Generator().manual_seed(0)
    batch = to_batch(trajectories, torch.float64)
    values = torch.randn(2, batch.num_tokens, generator=generator, dtype=torch.float64)
    scores = Scores(old_logprobs=torch.zeros(batch.num_tokens, dtype=torch.float64), values=values)
    targets = compute_targets(batch, scores, gamma=gamma, lam=lam)
    monte_carlo = monte_carlo_returns(batch, gamma)
    start = 0
    for t in trajectories:
        length, first = len(t.response_tokens), start + len(t.prompt_tokens) - 1
        rewards = [0.0] * length if t.token_rewards is None else [float(r) for r in t.token_rewards]
        rewards[-1] += t.reward
        v = [float(values[:, first + j].mean()) for j in range(length)] + [0.0]
        deltas = [rewards[j] + gamma * v[j + 1] - v[j] for j in range(length)]
        for j in range(length):
            advantage = sum((gamma * lam) ** (i - j) * deltas[i] for i in range(j, length))
            discounted = sum(gamma ** (i - j) * rewards[i] for i in range(j, length))
            assert float(targets.advantages[first + j]) == pytest.approx(advantage, abs=1e-12)
            assert float(targets.returns[first + j]) == pytest.approx(advantage + v[j], abs=1e-12)
            assert float(monte_carlo[first + j]) == pytest.approx(discounted, abs=1e-12)
        start += t.num_tokens


def test_a_group_advantage_compares_total_rewards():
    trajectories = [
        trajectory(1, 2, 1.0, 0, [0.5, 0.25]),
        trajectory(1, 3, 0.0, 0, None),
        trajectory(1, 1, 0.5, 0, [-1.0]),
    ]
    batch = to_batch(trajectories)
    scores = Scores(torch.zeros(batch.num_tokens), torch.zeros(0, batch.num_tokens))
    targets = compute_targets(batch, scores, advantage="dr_grpo")
    totals = torch.tensor([1.75, 0.0, -0.5])
    expected = (totals - totals.mean()).repeat_interleave(torch.tensor([3, 4, 2])) * batch.loss_mask
    torch.testing.assert_close(targets.advantages, expected)


def test_what_lies_outside_the_loss_mask_does_not_count():
    batch = to_batch(random_trajectories())
    spoiled = torch.where(batch.loss_mask, batch.token_rewards, torch.nan)
    scores = Scores(torch.zeros(batch.num_tokens), torch.zeros(1, batch.num_tokens))
    expected = compute_targets(batch, scores)
    found = compute_targets(dataclasses.replace(batch, token_rewards=spoiled), scores)
    assert torch.equal(found.advantages, expected.advantages) and torch.equal(found.returns, expected.returns)


def test_zero_dense_rewards_change_nothing():
    trajectories = random_trajectories()
    without = to_batch([dataclasses.replace(t, token_rewards=None) for t in trajectories])
    zeros = to_batch([dataclasses.replace(t, token_rewards=np.zeros(len(t.response_tokens))) for t in trajectories])
    scores = Scores(torch.zeros(without.num_tokens), torch.ones(1, without.num_tokens))
    a, b = compute_targets(without, scores), compute_targets(zeros, scores)
    assert torch.equal(a.advantages, b.advantages) and torch.equal(a.returns, b.returns)
