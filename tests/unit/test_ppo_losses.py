"""Aggregation, the policy loss: values, gradients, micro-batches, and what must not leak."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from asyppo_megatron.ppo.losses import (
    AGGREGATIONS,
    POLICY_KINDS,
    aggregate,
    high_entropy_clip,
    policy_loss,
    policy_token_loss,
)

F64 = torch.float64


def cu(*sizes):
    return torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)


def bools(*bits):
    return torch.tensor(bits, dtype=torch.bool)


def random_batch(seed=0, sizes=(7, 1, 12, 4, 9), dtype=F64):
    """Inputs of `policy_loss`, one sequence (the fourth) without a trainable token."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(sizes)
    logprobs = -3 * torch.rand(total, generator=generator, dtype=dtype)
    mask = torch.rand(total, generator=generator) < 0.7
    mask[20:24] = False
    mask[7] = True
    return {
        "logprobs": logprobs,
        "entropies": torch.rand(total, generator=generator, dtype=dtype),
        "old_logprobs": logprobs + 0.5 * torch.randn(total, generator=generator, dtype=dtype),
        "advantages": torch.randn(total, generator=generator, dtype=dtype),
        "loss_mask": mask,
        "cu_seqlens": cu(*sizes),
        "advantage_mask": mask & (torch.rand(total, generator=generator) < 0.8),
        "entropy_mask": mask & (torch.rand(total, generator=generator) < 0.8),
    }


def loss_and_gradients(inputs, **options):
    inputs = dict(inputs)
    for name in ("logprobs", "entropies"):
        inputs[name] = inputs[name].clone().requires_grad_()
    total, count = policy_loss(**inputs, **options)
    (total / count.clamp(min=1)).backward()
    return total, count, [inputs[n].grad if inputs[n].grad is not None else 0.0 for n in ("logprobs", "entropies")]


def take_sequences(inputs, chosen):
    """The batch of some sequences of a batch, and their positions in it."""
    starts = inputs["cu_seqlens"].tolist()
    where = torch.cat([torch.arange(starts[n], starts[n + 1]) for n in chosen])
    part = {name: value[where] for name, value in inputs.items() if name != "cu_seqlens"}
    return part | {"cu_seqlens": cu(*[starts[n + 1] - starts[n] for n in chosen])}, where


def test_ppo_token_losses_by_hand():
    ratio = torch.tensor([1.0, 1.5, 0.5, 1.5, 0.5], dtype=F64)
    advantages = torch.tensor([2.0, 1.0, 1.0, -1.0, -1.0], dtype=F64)
    loss = policy_token_loss(ratio.log(), torch.zeros(5, dtype=F64), advantages, clip_low=0.2, clip_high=0.25)
    torch.testing.assert_close(loss, torch.tensor([-2.0, -1.25, -0.5, 1.5, 0.8], dtype=F64), rtol=0, atol=1e-15)


def test_dual_clip_bounds_the_loss_of_negative_advantages_only():
    ratio = torch.tensor([10.0, 10.0, 2.0], dtype=F64)
    advantages = torch.tensor([-1.0, 1.0, -1.0], dtype=F64)
    options = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0}
    loss = policy_token_loss(ratio.log(), torch.zeros(3, dtype=F64), advantages, **options)
    torch.testing.assert_close(loss, torch.tensor([3.0, -1.2, 2.0], dtype=F64), rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match="dual_clip"):
        policy_token_loss(ratio, ratio, advantages, clip_low=0.2, clip_high=0.2, dual_clip=0.9)


def test_aggregations_by_hand():
    # Sequences of 2, 1 and 0 trainable tokens.
    losses = torch.tensor([0.0, 1.0, 2.0, 4.0, 0.0, 0.0])
    mask, cus = bools(0, 1, 1, 1, 0, 0), cu(3, 2, 1)
    found = {how: aggregate(losses, mask, cus, how, length_norm=4) for how in AGGREGATIONS}
    assert {how: (float(s), int(c)) for how, (s, c) in found.items()} == {
        "seq-mean-token-mean": (5.5, 2),
        "token-mean": (7.0, 3),
        "seq-mean-token-sum": (7.0, 2),
        "seq-mean-token-sum-norm": (1.75, 2),
    }
    with pytest.raises(ValueError, match="length_norm"):
        aggregate(losses, mask, cus, "seq-mean-token-sum-norm")
    with pytest.raises(ValueError, match="batch-mean"):
        aggregate(losses, mask, cus, "batch-mean")


def test_without_masks_and_bonus_the_loss_is_classic_ppo():
    batch = random_batch(dtype=torch.float32)
    mask, starts = batch["loss_mask"], batch["cu_seqlens"].tolist()
    ratio = torch.exp(batch["logprobs"] - batch["old_logprobs"])
    unclipped, clipped = -batch["advantages"] * ratio, -batch["advantages"] * torch.clamp(ratio, 0.8, 1.2)
    classic = torch.max(unclipped, clipped)
    names = ("logprobs", "old_logprobs", "advantages", "loss_mask")
    token = policy_token_loss(**{n: batch[n] for n in names}, clip_low=0.2, clip_high=0.2)
    assert torch.equal(token[mask], classic[mask])
    assert not token[~mask].any()
    # As a token mean to the bit; as a mean over responses up to the order of additions.
    everywhere = {"advantage_mask": torch.ones_like(mask), "entropy_mask": torch.ones_like(mask)}
    total, count = policy_loss(**batch | everywhere, aggregation="token-mean")
    assert torch.equal(total / count, torch.where(mask, classic, 0).sum() / mask.sum())
    means = [classic[s:e][mask[s:e]].double().mean() for s, e in pairwise(starts) if mask[s:e].any()]
    total, count = policy_loss(**batch | everywhere)
    torch.testing.assert_close(total / count, torch.stack(means).mean().float(), rtol=2e-7, atol=0)


def test_masked_advantages_and_entropies_stay_in_the_denominator():
    zero = torch.zeros(4, dtype=F64)
    total, count = policy_loss(
        zero,
        torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64),
        zero,
        torch.tensor([10.0, 20.0, 30.0, 40.0], dtype=F64),
        bools(1, 1, 1, 1),
        cu(4),
        advantage_mask=bools(0, 1, 1, 1),
        entropy_mask=bools(1, 1, 1, 0),
        entropy_coef=0.5,
    )
    assert (float(total), int(count)) == (-(20 + 30 + 40) / 4 - 0.5 * (1 + 2 + 3) / 4, 1)


def test_the_loss_equals_a_plain_loop_over_responses():
    batch = random_batch(3)
    total, count = policy_loss(**batch, entropy_coef=0.01, clip_low=0.1, clip_high=0.3)
    expected, responses = 0.0, 0
    starts = batch["cu_seqlens"].tolist()
    for start, end in pairwise(starts):
        tokens = [t for t in range(start, end) if batch["loss_mask"][t]]
        responses += bool(tokens)
        for t in tokens:
            ratio, a = math.exp(batch["logprobs"][t] - batch["old_logprobs"][t]), float(batch["advantages"][t])
            objective = min(ratio * a, min(max(ratio, 0.9), 1.3) * a) * bool(batch["advantage_mask"][t])
            bonus = 0.01 * float(batch["entropies"][t]) * bool(batch["entropy_mask"][t])
            expected -= (objective + bonus) / len(tokens)
    assert int(count) == responses == 4
    assert float(total) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("kind", POLICY_KINDS)
def test_micro_batches_add_up_to_the_whole_batch(kind, aggregation):
    batch = random_batch(1)
    options = {"kind": kind, "aggregation": aggregation, "length_norm": 16.0, "entropy_coef": 0.01}
    total, count, gradients = loss_and_gradients(batch, **options)
    sums, counts = 0.0, 0
    parts = [torch.zeros_like(batch["logprobs"]) for _ in range(2)]
    for chosen in ([4, 0], [3], [2, 1]):
        part, where = take_sequences(batch, chosen)
        part = {n: v.clone().requires_grad_() if n in ("logprobs", "entropies") else v for n, v in part.items()}
        part_sum, part_count = policy_loss(**part, **options)
        (part_sum / count).backward()  # the global denominator
        for result, name in zip(parts, ("logprobs", "entropies"), strict=True):
            result[where] = part[name].grad
        sums, counts = sums + part_sum, counts + part_count
    assert int(counts) == int(count)
    torch.testing.assert_close(sums, total, rtol=1e-13, atol=1e-15)
    for found, expected in zip(parts, gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("kind", POLICY_KINDS)
def test_nothing_outside_the_loss_mask_reaches_a_value_or_a_gradient(kind):
    batch = random_batch(2, dtype=torch.float32)
    expected = loss_and_gradients(batch, kind=kind, entropy_coef=0.01)
    for junk in (torch.nan, torch.inf, -torch.inf, 1e30):
        spoiled = {
            n: torch.where(batch["loss_mask"], v, junk) if v.is_floating_point() else v for n, v in batch.items()
        }
        spoiled["advantage_mask"] = batch["advantage_mask"] | ~batch["loss_mask"]
        spoiled["entropy_mask"] = batch["entropy_mask"] | ~batch["loss_mask"]
        found = loss_and_gradients(spoiled, kind=kind, entropy_coef=0.01)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
        for a, b in zip(found[2], expected[2], strict=True):
            assert torch.equal(a, b)
            assert not a[~batch["loss_mask"]].any()


@pytest.mark.parametrize("kind", POLICY_KINDS)
@pytest.mark.parametrize("sizes", [(), (0,), (3, 2)])
def test_a_batch_without_trainable_tokens_has_loss_and_count_zero(kind, sizes):
    total = sum(sizes)
    x = torch.full((total,), torch.nan, requires_grad=True)
    loss, count = policy_loss(
        x, x, x.detach(), x.detach(), torch.zeros(total).bool(), cu(*sizes), kind=kind, entropy_coef=0.1
    )
    assert (float(loss.detach()), int(count)) == (0.0, 0)
    loss.backward()
    assert not x.grad.any() if total else True


@pytest.mark.parametrize("kind", POLICY_KINDS)
def test_broken_scores_give_finite_losses(kind):
    new, old = torch.tensor([-1e4, -0.1, -90.0, -0.0]), torch.tensor([-0.1, -1e4, -0.0, -90.0])
    batch = {"loss_mask": bools(1, 1, 1, 1), "cu_seqlens": cu(1, 1, 2), "entropies": torch.zeros(4)}
    for sign in (-1.0, 0.0, 1.0):
        inputs = batch | {"logprobs": new, "old_logprobs": old, "advantages": torch.full((4,), sign)}
        total, _, gradients = loss_and_gradients(inputs, kind=kind)
        assert total.isfinite() and gradients[0].isfinite().all()


@pytest.mark.parametrize(
    "dtype, expected", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (F64, F64)]
)
def test_losses_are_computed_in_float32_or_in_float64_when_given_it(dtype, expected):
    batch = {n: v.to(dtype) if v.is_floating_point() else v for n, v in random_batch().items()}
    for kind in POLICY_KINDS:
        total, count = policy_loss(**batch, kind=kind, entropy_coef=0.1)
        assert total.dtype == expected and count.dtype == torch.long


# The kinds without a stop-gradient; test_ppo_family.py checks the gradients of the others by hand.
@pytest.mark.parametrize("kind", ["ppo", "gspo", "spo"])
def test_gradients_equal_finite_differences(kind):
    batch = random_batch(6, sizes=(3, 1, 4, 16, 4))

    def loss(logprobs, entropies):
        inputs = batch | {"logprobs": logprobs, "entropies": entropies}
        return policy_loss(**inputs, kind=kind, entropy_coef=0.1, clip_low=0.3, clip_high=0.3)[0]

    x, entropies = (batch[n].clone().requires_grad_() for n in ("logprobs", "entropies"))
    assert torch.autograd.gradcheck(loss, (x, entropies))


def test_a_clip_range_may_differ_from_token_to_token():
    ratio = torch.full((2,), 1.5, dtype=F64)
    wide = torch.tensor([0.2, 0.4], dtype=F64)
    for kind in ("ppo", "cispo"):
        loss = policy_token_loss(
            ratio.log(), ratio * 0, torch.ones(2, dtype=F64), kind=kind, clip_low=wide, clip_high=wide
        )
        by_number = [
            policy_token_loss(ratio.log(), ratio * 0, ratio * 0 + 1, kind=kind, clip_low=c, clip_high=c)[i]
            for i, c in enumerate((0.2, 0.4))
        ]
        assert torch.equal(loss, torch.stack(by_number))


def test_the_highest_entropy_tokens_of_each_response_get_the_wider_clip():
    entropies = torch.tensor([9.0, 1.0, 3.0, 3.0, 2.0, 0.5, 7.0, 1.0, 2.0, 3.0, torch.nan])
    mask = bools(0, 1, 1, 1, 1, 1, 1, 0, 1, 1, 0)
    clip = high_entropy_clip(entropies, mask, cu(7, 4), clip=0.2, high_entropy=0.4, fraction=0.34)
    wide = [t for t in range(11) if clip[t] > 0.3]
    assert wide == [2, 6]  # 2 of 6 tokens, the lower of the equal ones; 0 of 2 tokens
