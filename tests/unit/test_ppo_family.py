"""What ties the members of the family together, and each one's own branches."""

from __future__ import annotations

import math

import pytest
import torch

from asyppo_megatron.ppo.advantages import group_advantages
from asyppo_megatron.ppo.losses import POLICY_KINDS, policy_loss, policy_token_loss

F64 = torch.float64
CLIP = {"clip_low": 0.2, "clip_high": 0.2}


def cu(*sizes):
    return torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)


def token_gradient(ratio, advantage, kind, **options):
    """(loss, d loss / d logprob) of one token, its own response, of old logprob -2."""
    new = torch.tensor([-2.0 + math.log(ratio)], dtype=F64, requires_grad=True)
    loss = policy_token_loss(
        new,
        torch.tensor([-2.0], dtype=F64),
        torch.tensor([advantage], dtype=F64),
        kind=kind,
        cu_seqlens=cu(1),
        **CLIP | options,
    )
    loss.sum().backward()
    return float(loss.detach()), float(new.grad)


def random_inputs(seed=0, sizes=(5, 3, 8), spread=0.5):
    generator = torch.Generator().manual_seed(seed)
    total = sum(sizes)
    old = -3 * torch.rand(total, generator=generator, dtype=F64)
    new = old + spread * torch.randn(total, generator=generator, dtype=F64)
    return new.requires_grad_(), old, torch.randn(total, generator=generator, dtype=F64), cu(*sizes)


def loss_and_gradient(kind, new, old, advantages, cu_seqlens, **options):
    new = new.detach().clone().requires_grad_()
    mask = torch.ones(new.shape, dtype=torch.bool)
    total, count = policy_loss(new, None, old, advantages, mask, cu_seqlens, kind=kind, **options)
    (total / count).backward()
    return total.detach() / count, new.grad


@pytest.mark.parametrize("kind", ["gspo", "cispo", "aspo"])
def test_on_policy_every_ratio_method_has_the_gradient_of_ppo(kind):
    new, _, advantages, cus = random_inputs()
    if kind == "gspo":  # its ratio is the response's: so must the advantage be
        advantages = torch.tensor([1.5, -0.5, 0.25], dtype=F64).repeat_interleave(torch.tensor([5, 3, 8]))
    ppo_loss, ppo_gradient = loss_and_gradient("ppo", new, new.detach(), advantages, cus)
    loss, gradient = loss_and_gradient(kind, new, new.detach(), advantages, cus)
    torch.testing.assert_close(gradient, ppo_gradient, rtol=1e-13, atol=1e-16)
    if kind != "cispo":  # the value of cispo is a log-likelihood
        torch.testing.assert_close(loss, ppo_loss, rtol=1e-13, atol=1e-16)


def test_gspo_is_grpo_for_answers_of_one_token():
    generator = torch.Generator().manual_seed(1)
    groups = torch.arange(4).repeat_interleave(8)
    advantages = group_advantages(torch.rand(32, generator=generator, dtype=F64), groups, "grpo")
    old = -3 * torch.rand(32, generator=generator, dtype=F64)
    new = old + 0.3 * torch.randn(32, generator=generator, dtype=F64)
    cus = cu(*[1] * 32)
    for aggregation in ("seq-mean-token-mean", "token-mean"):
        a = loss_and_gradient("ppo", new, old, advantages, cus, aggregation=aggregation)
        b = loss_and_gradient("gspo", new, old, advantages, cus, aggregation=aggregation)
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_gspo_clips_the_ratio_of_the_whole_response():
    # Log-ratios 0.3 and -0.1: mean 0.1 is inside the clip range although the first alone is outside.
    new = torch.tensor([-1.0, -1.0], dtype=F64, requires_grad=True)
    old = torch.tensor([-1.3, -0.9], dtype=F64)
    loss, gradient = loss_and_gradient("gspo", new, old, torch.ones(2, dtype=F64), cu(2))
    assert float(loss) == pytest.approx(-math.exp(0.1), rel=1e-14)
    assert gradient.tolist() == pytest.approx([-math.exp(0.1) / 2] * 2, rel=1e-14)
    loss, gradient = loss_and_gradient("gspo", new, old, torch.ones(2, dtype=F64), cu(2), clip_high=0.05)
    assert float(loss) == pytest.approx(-1.05) and not gradient.any()


def test_cispo_weights_every_token_by_a_clipped_ratio_without_gradient():
    assert token_gradient(1.5, 2.0, "cispo") == pytest.approx((-1.2 * 2.0 * (math.log(1.5) - 2), -2.4))
    assert token_gradient(0.5, 2.0, "cispo", clip_low=1.0)[1] == pytest.approx(-1.0)
    assert token_gradient(0.5, 2.0, "cispo")[1] == pytest.approx(-1.6)
    assert token_gradient(9.0, -1.0, "cispo", clip_high=5.0)[1] == pytest.approx(6.0)


@pytest.mark.parametrize(
    "ratio, advantage, weight",
    [
        (1.0, 1.0, 1.0),
        (0.5, 1.0, 2.0),  # a token the policy lost is pushed harder: 1/r
        (1.1, 1.0, 1 / 1.1),
        (1.3, 1.0, 0.0),  # exactly zero above 1 + eps
        (0.25, 1.0, 3.0),  # 1/r = 4 > 3: the soft dual clip
        (1.0, -1.0, 1.0),
        (2.0, -1.0, 2.0),
        (0.7, -1.0, 0.0),  # below 1 - eps: clipped as in ppo
        (4.0, -1.0, 3.0),  # r > 3: the soft dual clip
        (1.7, 0.0, 0.0),
    ],
)
def test_aspo_weights_the_gradient_of_each_token(ratio, advantage, weight):
    loss, gradient = token_gradient(ratio, advantage, "aspo")
    assert gradient == pytest.approx(-weight * advantage, rel=1e-14, abs=0)
    if advantage > 0 and ratio > 1.2:
        assert loss == 0.0


def test_aspo_is_ppo_for_negative_advantages_below_the_dual_clip():
    for ratio in (0.3, 0.79, 0.81, 1.0, 1.19, 1.5, 2.9):
        assert token_gradient(ratio, -0.7, "aspo") == pytest.approx(token_gradient(ratio, -0.7, "ppo"), rel=1e-13)


def test_aspo_holds_extreme_ratios():
    for gap in (-1000.0, 1000.0):
        new = torch.tensor([-1.0], requires_grad=True)
        for sign in (-1.0, 1.0):
            loss = policy_token_loss(new, new.detach() - gap, torch.tensor([sign]), kind="aspo", **CLIP)
            loss.backward()
            assert loss.isfinite().all() and new.grad.isfinite().all()


def test_asympo_has_value_zero_for_zero_sum_advantages_and_a_gradient():
    new, _, _, cus = random_inputs(2)
    rewards = torch.tensor([1.0, 0.0, 0.0], dtype=F64)
    sequence = group_advantages(rewards, torch.zeros(3, dtype=torch.long), "dr_grpo")
    advantages = sequence.repeat_interleave(torch.tensor([5, 3, 8]))
    loss, gradient = loss_and_gradient("asympo", new, None, advantages, cus)
    assert abs(float(loss)) < 1e-15
    nll = torch.stack([-x.mean() for x in new.detach().split([5, 3, 8])])
    expected = (-sequence / nll / torch.tensor([5, 3, 8]) / 3).repeat_interleave(torch.tensor([5, 3, 8]))
    torch.testing.assert_close(gradient, expected, rtol=1e-13, atol=0)
    assert gradient.abs().min() > 1e-3


def test_asympo_leaves_a_certain_response_unscaled():
    new = torch.tensor([-1e-9, -2.0], dtype=F64)
    _, gradient = loss_and_gradient("asympo", new, None, torch.tensor([1.0, 1.0], dtype=F64), cu(1, 1))
    assert gradient.tolist() == [-0.5, -0.25]
    _, gradient = loss_and_gradient("asympo", new * 0, None, torch.tensor([1.0, 1.0], dtype=F64), cu(1, 1))
    assert gradient.tolist() == [-0.5, -0.5]


def test_spo_scales_negative_advantages_down():
    new, advantages = torch.tensor([-1.0, -4.0], dtype=F64), torch.tensor([2.0, -2.0], dtype=F64)
    loss, gradient = loss_and_gradient("spo", new, None, advantages, cu(1, 1))
    assert float(loss) == (2.0 - 4.0) / 2 and gradient.tolist() == [-1.0, 0.5]
    _, gradient = loss_and_gradient("spo", new, None, advantages, cu(1, 1), negative_scale=0.25)
    assert gradient.tolist() == [-1.0, 0.25]


def test_zero_advantages_give_no_gradient():
    new, old, advantages, cus = random_inputs(3)
    for kind in POLICY_KINDS:
        assert not loss_and_gradient(kind, new, old, advantages * 0, cus)[1].any()


def test_a_kind_without_what_it_needs_is_refused():
    x = torch.zeros(2)
    with pytest.raises(ValueError, match="trpo"):
        policy_token_loss(x, x, x, kind="trpo", **CLIP)
    for kind in ("gspo", "asympo"):
        with pytest.raises(ValueError, match="cu_seqlens"):
            policy_token_loss(x, x, x, kind=kind, **CLIP)
    for kind in ("ppo", "cispo", "aspo"):
        with pytest.raises(ValueError, match="old_logprobs"):
            policy_token_loss(x, None, x, kind=kind, **CLIP)
    with pytest.raises(ValueError, match="entropies"):
        policy_loss(x, None, x, x, torch.ones(2).bool(), cu(2), entropy_coef=0.1)
