"""What ranks compare or add up about their targets: the checksum, and explained variance."""

from __future__ import annotations

import dataclasses

import torch

from asyppo_megatron.ppo.targets import checksum, compute_targets, explained_variance, explained_variance_sums
from asyppo_megatron.types import PackedBatch, Scores, Targets

TENSORS = ("old_logprobs", "advantages", "returns", "advantage_mask", "entropy_mask", "reference_logprobs")


def random_targets():
    generator = torch.Generator().manual_seed(4)
    old, reference, rollout = -2 * torch.rand(3, 32, generator=generator)
    batch = PackedBatch(
        step=0,
        policy_version=0,
        tokens=torch.zeros(32, dtype=torch.int32),
        cu_seqlens=torch.tensor([0, 9, 13, 25, 32], dtype=torch.int32),
        loss_mask=torch.rand(32, generator=generator) < 0.8,
        rollout_logprobs=rollout,
        rewards=torch.rand(4, generator=generator),
        group_ids=torch.tensor([0, 0, 1, 1]),
        truncated=torch.zeros(4, dtype=torch.bool),
    )
    scores = Scores(old, torch.rand(2, 32, generator=generator), reference)
    return compute_targets(batch, scores, gamma=0.99, lam=0.9, k=0.2, h=0.2, whiten=True)


def test_computing_targets_twice_gives_the_same_bits():
    assert int(checksum(random_targets())) == int(checksum(random_targets())) != 0


def test_the_checksum_sees_every_bit_of_every_tensor():
    targets = random_targets()
    found = {int(checksum(targets))}
    changed = 0
    for name in TENSORS:
        for at in (0, 17, 31):
            tensor = getattr(targets, name).clone()
            if tensor.dtype == torch.bool:
                tensor[at] = ~tensor[at]
            else:
                tensor.view(torch.int32)[at] ^= 1
            found.add(int(checksum(dataclasses.replace(targets, **{name: tensor}))))
            changed += 1
    swapped = dataclasses.replace(targets, advantages=targets.returns, returns=targets.advantages)
    found.add(int(checksum(swapped)))
    assert len(found) == changed + 2


def test_the_checksum_of_a_known_tensor_stays():
    floats = torch.tensor([[-1.0, -2.0, 0.0], [0.5, 0.75, 0.0], [1.0, 1.0, -0.0]])
    bits = torch.tensor([[True, True, False], [True, False, False]])
    expected = 0
    words = [*floats.view(torch.int32).tolist(), *bits.int().tolist(), []]
    for part in words:
        expected = expected * 0x9E3779B97F4A7C15 + sum((2 * i + 1) * bits for i, bits in enumerate(part))
    assert int(checksum(Targets(*floats, *bits))) % 2**64 == expected % 2**64


def test_explained_variance_by_hand_and_summed_over_parts():
    returns = torch.tensor([0.0, 2.0, 0.0, 2.0, torch.nan])
    values = torch.tensor([0.5, 1.5, 0.5, 1.5, 3.0])
    mask = torch.tensor([True, True, True, True, False])
    sums = explained_variance_sums(values, returns, mask)
    assert float(explained_variance(sums)) == 0.75
    parts = sum(explained_variance_sums(values[s], returns[s], mask[s]) for s in (slice(0, 1), slice(1, 5)))
    assert float(explained_variance(parts)) == 0.75
    assert float(explained_variance(explained_variance_sums(returns, returns, mask))) == 1.0
    constant = torch.full((5,), 1.0)
    assert float(explained_variance(explained_variance_sums(constant, returns, mask))) == 0.0


def test_constant_returns_have_no_variance_to_explain():
    mask = torch.ones(1000, dtype=torch.bool)
    sums = explained_variance_sums(torch.rand(1000), torch.full((1000,), 0.1), mask)
    assert explained_variance(sums).isnan()
    assert explained_variance(torch.zeros(5, dtype=torch.float64)).isnan()
