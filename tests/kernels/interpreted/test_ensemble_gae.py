"""The GAE kernel against float64: mean and deviation, packed sequences, skipped tokens, gamma and lambda."""

from __future__ import annotations

import pytest
import torch

from asyppo_megatron.kernels import ensemble_gae as module
from asyppo_megatron.kernels.ensemble_gae import ensemble_gae
from asyppo_megatron.ppo.ensemble_gae import ensemble_gae as reference_ensemble_gae
from asyppo_megatron.ppo.targets import compute_targets
from asyppo_megatron.types import PackedBatch, Scores

NAN = float("nan")


@pytest.fixture(autouse=True)
def _several_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 16)


def compare(name, values, rewards, mask, cu_seqlens, **options):
    """Kernel in f32 against the reference in f64 on the same numbers, by absolute error."""
    wide = {k: v.cpu().double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    expected = reference_ensemble_gae(
        values.cpu().double(), rewards.cpu().double(), mask.cpu(), cu_seqlens.cpu(), **wide
    )
    found = ensemble_gae(values, rewards, mask, cu_seqlens, **options)
    errors = {
        key: (x.cpu().double() - y).abs().max().item() if y.numel() else 0.0
        for key, x, y in zip(found._fields, found, expected, strict=True)
    }
    print(f"FIGURE gae {name} " + " ".join(f"{k}={v:.1e}" for k, v in errors.items()))
    assert max(errors.values()) <= 1e-5
    assert not torch.cat([x[~mask] for x in found]).any()
    return found


def make(device, critics=2, count=100):
    cu_seqlens = torch.tensor([0, 1, 1, 38, 54, 100], dtype=torch.int32)[: 6 if count else 1]
    rewards = torch.where(torch.rand(count) < 0.2, torch.randn(count), 0.0)
    return [x.to(device) for x in (torch.randn(critics, count), rewards, torch.rand(count) < 0.7)], cu_seqlens


@pytest.mark.parametrize("how", ["mean", "min"])
@pytest.mark.parametrize("critics", [1, 2, 5])
def test_packed_sequences_with_gaps_agree_with_float64(critics, how, device):
    inputs, cu_seqlens = make(device, critics)
    found = compare(f"M={critics} {how}", *inputs, cu_seqlens, gamma=0.97, lam=0.9, how=how)
    if critics == 1:
        assert not found.std.any()


def test_lambda_may_differ_from_sequence_to_sequence(device):
    inputs, cu_seqlens = make(device)
    compare("lambda", *inputs, cu_seqlens, lam=torch.tensor([1.0, 0.5, 0.0, 0.95, 0.3], device=device))


def test_a_known_sequence_gives_the_hand_computed_advantages(device):
    """Values 1, (skipped), 2, 3; reward 10 at the end; gamma 1, lambda 1/2: G = 10, 6.5, 4.25."""
    values = torch.tensor([[1.0, NAN, 2.0, 3.0]], device=device)
    rewards = torch.tensor([0.0, 7.0, 0.0, 10.0], device=device)
    mask = torch.tensor([True, False, True, True], device=device)
    found = ensemble_gae(values, rewards, mask, torch.tensor([0, 4], dtype=torch.int32), lam=0.5)
    assert found.returns.tolist() == [4.25, 0.0, 6.5, 10.0]
    assert found.advantages.tolist() == [3.25, 0.0, 4.5, 7.0]


def test_gamma_and_lambda_of_one_give_the_reward_minus_the_value_exactly(device):
    (values, _, mask), cu_seqlens = make(device)
    rewards = torch.zeros(100, device=device)
    mask[99] = True
    rewards[99] = 0.1
    found = ensemble_gae(values, rewards, mask, cu_seqlens)
    assert torch.equal(found.returns[54:][mask[54:]], rewards[99].expand(int(mask[54:].sum())))


def test_nan_and_inf_on_dead_tokens_reach_nothing(device):
    (values, rewards, mask), cu_seqlens = make(device)
    clean = ensemble_gae(values, rewards, mask, cu_seqlens, gamma=0.9, lam=0.8)
    values[:, ~mask], rewards[~mask] = NAN, float("inf")
    found = ensemble_gae(values, rewards, mask, cu_seqlens, gamma=0.9, lam=0.8)
    assert all(torch.equal(x, y) for x, y in zip(found, clean, strict=True))


def test_eight_thousand_tokens_stay_within_the_bound(device, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 512)
    count = 8192
    rewards = torch.zeros(count)
    rewards[-1] = 1.0
    inputs = [x.to(device) for x in (torch.rand(2, count), rewards, torch.ones(count, dtype=torch.bool))]
    compare("8192 tokens", *inputs, torch.tensor([0, count], dtype=torch.int32), gamma=0.999, lam=0.99)


def test_zero_tokens_give_empty_results(device):
    inputs, cu_seqlens = make(device, count=0)
    assert all(x.shape == (0,) for x in ensemble_gae(*inputs, cu_seqlens))


def test_bf16_values_are_computed_in_f32(device):
    (values, rewards, mask), cu_seqlens = make(device)
    compare("bf16", values.bfloat16(), rewards, mask, cu_seqlens, gamma=0.9)


def test_no_critic_and_unknown_aggregates_are_refused(device):
    (values, rewards, mask), cu_seqlens = make(device)
    with pytest.raises(ValueError, match="at least one critic"):
        ensemble_gae(values[:0], rewards, mask, cu_seqlens)
    with pytest.raises(ValueError, match="mean or min"):
        ensemble_gae(values, rewards, mask, cu_seqlens, how="max")


def test_targets_of_a_step_are_the_same_with_the_kernel(device):
    """`compute_targets` takes the kernel in place of its own estimate: values, deviations and so the masks agree."""
    sizes = torch.tensor([9, 4, 12, 6])
    total = int(sizes.sum())
    mask = torch.rand(total) < 0.7
    mask[sizes.cumsum(0) - 1] = False
    batch = PackedBatch(
        step=0,
        policy_version=0,
        tokens=torch.zeros(total, dtype=torch.int32, device=device),
        cu_seqlens=torch.tensor([0, *sizes.cumsum(0).tolist()], dtype=torch.int32),
        loss_mask=mask.to(device),
        rollout_logprobs=-torch.rand(total, device=device),
        rewards=torch.randn(4, device=device),
        group_ids=torch.tensor([0, 0, 1, 1], device=device),
        truncated=torch.zeros(4, dtype=torch.bool, device=device),
    )
    scores = Scores(-torch.rand(total, device=device), torch.randn(3, total, device=device))
    options = {"gamma": 0.99, "lam": 0.9, "critic_lam": 1.0, "k": 0.2, "h": 0.2}
    expected = compute_targets(batch, scores, **options)
    found = compute_targets(batch, scores, estimate=ensemble_gae, **options)
    torch.testing.assert_close(found.advantages, expected.advantages, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.returns, expected.returns, atol=1e-5, rtol=0)
    assert torch.equal(found.advantage_mask, expected.advantage_mask)
    assert torch.equal(found.entropy_mask, expected.entropy_mask)
