"""Nothing in `ppo` waits for the device: on the meta device, asking a tensor for its value raises."""

from __future__ import annotations

import pytest
import torch

from asyppo_megatron.ppo.losses import (
    AGGREGATIONS,
    POLICY_KINDS,
    high_entropy_clip,
    kl_loss,
    policy_loss,
    positive_nll_loss,
    value_loss,
)
from asyppo_megatron.ppo.segments import first_and_last
from asyppo_megatron.ppo.targets import checksum, compute_targets, explained_variance, explained_variance_sums
from asyppo_megatron.types import PackedBatch, Scores

TOKENS = 32
CU_SEQLENS = torch.tensor([0, 9, 13, 25, 32], dtype=torch.int32)  # on the CPU, as batches hold it


def floats(*shape):
    return torch.empty(*shape, device="meta")


def bools(*shape):
    return torch.empty(*shape, dtype=torch.bool, device="meta")


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("kind", POLICY_KINDS)
def test_the_policy_loss_never_asks_the_device_for_a_value(kind, aggregation):
    logprobs, entropies = floats(TOKENS).requires_grad_(), floats(TOKENS).requires_grad_()
    total, count = policy_loss(
        logprobs,
        entropies,
        floats(TOKENS),
        floats(TOKENS),
        bools(TOKENS),
        CU_SEQLENS,
        kind=kind,
        advantage_mask=bools(TOKENS),
        entropy_mask=bools(TOKENS),
        entropy_coef=0.01,
        aggregation=aggregation,
        length_norm=8.0,
    )
    (total / count).backward()
    assert logprobs.grad.shape == entropies.grad.shape == (TOKENS,)


def test_the_other_losses_never_ask_the_device_for_a_value():
    value_loss(floats(TOKENS), floats(TOKENS), bools(TOKENS), CU_SEQLENS, trajectories=bools(4))
    kl_loss(floats(TOKENS), floats(TOKENS), bools(TOKENS), CU_SEQLENS)
    high_entropy_clip(floats(TOKENS), bools(TOKENS), CU_SEQLENS)
    positive_nll_loss(floats(TOKENS), bools(TOKENS), bools(TOKENS))
    first_and_last(bools(TOKENS), CU_SEQLENS)


@pytest.mark.parametrize(
    "options",
    [
        {"k": 0.2, "h": 0.2, "lam": 0.95, "whiten": True, "importance": "truncated", "kl_coef": 0.1},
        {"advantage": "grpo", "importance": "masked"},
        {"lam": floats(4), "critic_lam": 1.0, "value_aggregate": "min"},
    ],
)
def test_targets_never_ask_the_device_for_a_value(options):
    groups = torch.empty(4, dtype=torch.long, device="meta")
    batch = PackedBatch(0, 0, floats(TOKENS), CU_SEQLENS, bools(TOKENS), floats(TOKENS), floats(4), groups, bools(4))
    scores = Scores(floats(TOKENS), floats(2, TOKENS), floats(TOKENS))
    assert checksum(compute_targets(batch, scores, **options)).shape == ()
    explained_variance(explained_variance_sums(floats(TOKENS), floats(TOKENS), bools(TOKENS)))
