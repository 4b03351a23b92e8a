"""The critics' loss and the KL estimators: values, gradients, shares, and what must not leak."""

from __future__ import annotations

import math

import pytest
import torch

from asyppo_megatron.ppo.kl import kl_estimate
from asyppo_megatron.ppo.losses import AGGREGATIONS, kl_loss, value_loss

F64 = torch.float64


def cu(*sizes):
    return torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)


def bools(*bits):
    return torch.tensor(bits, dtype=torch.bool)


def random_batch(seed, sizes=(7, 1, 12, 4, 9)):
    """Two score vectors, a mask and cu_seqlens; one sequence (the fourth) has no trainable token."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(sizes)
    first, second = torch.randn(2, total, generator=generator, dtype=F64)
    mask = torch.rand(total, generator=generator) < 0.7
    mask[20:24] = False
    return first, second, mask, cu(*sizes)


def test_the_value_loss_is_the_squared_error_with_factor_one():
    values, returns = torch.tensor([1.0, 2.0, torch.nan, 5.0]), torch.tensor([0.0, 4.0, torch.nan, 4.0])
    mask, cus = bools(1, 1, 0, 1), cu(3, 1)
    assert [float(x) for x in value_loss(values, returns, mask, cus)] == [6.0, 3.0]
    assert [float(x) for x in value_loss(values, returns, mask, cus, aggregation="seq-mean-token-mean")] == [3.5, 2.0]
    assert [float(x) for x in value_loss(values, returns, mask, cus, trajectories=bools(0, 1))] == [1.0, 1.0]
    assert [float(x) for x in value_loss(values, returns, mask, cus, trajectories=bools(0, 0))] == [0.0, 0.0]


def test_the_critics_gradients_are_disjoint_over_responses():
    returns, mask, cus = torch.ones(6), torch.ones(6).bool(), cu(2, 1, 3)
    gradients = []
    for share in (bools(1, 0, 1), bools(0, 1, 0)):
        values = torch.full((6,), 0.5, requires_grad=True)
        total, count = value_loss(values, returns, mask, cus, trajectories=share)
        (total / count).backward()
        gradients.append(values.grad)
    assert not (gradients[0] * gradients[1]).any()
    assert (gradients[0] + gradients[1]).abs().min() > 0


def test_value_clipping_takes_the_larger_error():
    values = torch.tensor([2.0, 2.0, 0.1], dtype=F64)
    old = torch.tensor([0.0, 0.0, 0.0], dtype=F64)
    returns = torch.tensor([0.0, 3.0, 0.0], dtype=F64)
    total, _ = value_loss(values, returns, bools(1, 1, 1), cu(3), value_clip=0.5, old_values=old)
    assert float(total) == pytest.approx(4.0 + 2.5**2 + 0.01)
    with pytest.raises(ValueError, match="old_values"):
        value_loss(values, returns, bools(1, 1, 1), cu(3), value_clip=0.5)


def test_value_loss_gradients_equal_finite_differences_and_ignore_the_rest():
    values, returns, mask, cus = random_batch(9)
    values, returns = values.requires_grad_(), torch.where(mask, returns, torch.nan)
    share = bools(1, 0, 1, 1, 0)

    def loss(v):
        return value_loss(v, returns, mask, cus, trajectories=share)[0]

    assert torch.autograd.gradcheck(loss, values)


def test_kl_estimators_by_hand():
    new, reference = torch.tensor([-1.0, -2.0], dtype=F64), torch.tensor([-2.0, -2.0], dtype=F64)
    assert kl_estimate(new, reference, "k1").tolist() == [1.0, 0.0]
    assert kl_estimate(new, reference, "k2").tolist() == [0.5, 0.0]
    assert kl_estimate(new, reference, "k3").tolist() == pytest.approx([math.exp(-1), 0.0])
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(new, reference, "k4")


def test_kl_estimators_average_to_the_divergence():
    p = torch.softmax(torch.randn(2, 50, generator=torch.Generator().manual_seed(0), dtype=F64) * 0.3, -1)
    new, reference = p.log()
    divergence = (p[0] * (new - reference)).sum()
    for kind, tolerance in (("k1", 1e-14), ("k3", 1e-14), ("k2", 0.1)):
        average = (p[0] * kl_estimate(new, reference, kind)).sum()
        assert float(average) == pytest.approx(float(divergence), rel=tolerance)


def test_the_kl_loss_aggregates_like_the_policy_loss_and_leaks_nothing():
    new, reference, mask, cus = random_batch(4)
    expected = kl_estimate(new, reference, "k3")[mask].sum()
    reference = torch.where(mask, reference, torch.nan)
    new = torch.where(mask, new, torch.nan).requires_grad_()
    total, count = kl_loss(new, reference, mask, cus, kind="k3", aggregation="token-mean")
    assert int(count) == int(mask.sum())
    torch.testing.assert_close(total, expected)
    total.backward()
    assert new.grad.isfinite().all() and not new.grad[~mask].any()
    for how in AGGREGATIONS:
        same = kl_loss(new.detach(), new.detach(), mask, cus, kind="k3", aggregation=how, length_norm=8.0)
        assert float(same[0]) == 0.0


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
def test_micro_batches_of_the_value_and_kl_losses_add_up_to_the_whole_batch(aggregation):
    first, second, mask, cus = random_batch(5)
    share, starts = bools(1, 0, 1, 1, 1), cus.tolist()
    for loss in (
        lambda a, b, m, c, s: value_loss(a, b, m, c, trajectories=s, aggregation=aggregation),
        lambda a, b, m, c, s: kl_loss(a, b, m, c, kind="k3", aggregation=aggregation),
    ):
        x = first.clone().requires_grad_()
        total, count = loss(x, second, mask, cus, share)
        (total / count).backward()
        y = first.clone().requires_grad_()
        sums, counts = 0.0, 0
        for low, high in ((0, 2), (2, 3), (3, 5)):
            part = slice(starts[low], starts[high])
            sum_, count_ = loss(y[part], second[part], mask[part], cus[low : high + 1] - starts[low], share[low:high])
            (sum_ / count).backward()
            sums, counts = sums + sum_.detach(), counts + count_
        assert int(counts) == int(count)
        torch.testing.assert_close(sums, total.detach(), rtol=1e-13, atol=0)
        torch.testing.assert_close(y.grad, x.grad, rtol=1e-13, atol=1e-16)
