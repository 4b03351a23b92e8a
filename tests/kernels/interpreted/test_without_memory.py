"""Operators on tensors without memory, kernels left out: their bytes at full size, and that none waits for the device.

On the meta device, asking a tensor for its value raises.
"""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from asyppo_megatron.kernels import ensemble_gae, policy_loss, reference, softmax
from asyppo_megatron.kernels.linear_policy_loss import linear_policy_loss
from asyppo_megatron.kernels.logprob_entropy import logprob_entropy as kernel_logprob_entropy
from asyppo_megatron.ppo.logprob import logprob_entropy
from asyppo_megatron.ppo.losses import AGGREGATIONS

TOKENS, HIDDEN, VOCABULARY, CHUNK = 8192, 5120, 151_936, 1024


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside have held at a time."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        held = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in held | self.known:
                self._add(x.untyped_storage())
        return out

    def _add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key, size):
        self.known.discard(key)
        self.now -= size


class _Nothing:
    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


@pytest.fixture(autouse=True)
def _kernels_left_out(device, monkeypatch):
    if device.type != "cpu":
        pytest.skip("the same on every device; the benchmark measures peaks on a GPU")
    for name in ("statistics_kernel", "finish_kernel", "gradient_kernel"):
        monkeypatch.setattr(softmax, name, _Nothing())
    monkeypatch.setattr(policy_loss, "policy_loss_kernel", _Nothing())
    monkeypatch.setattr(ensemble_gae, "ensemble_gae_kernel", _Nothing())
    monkeypatch.setattr(torch, "_assert_async", lambda x: None)


def _inputs():
    meta = {"device": "meta"}
    hidden = torch.empty(TOKENS, HIDDEN, dtype=torch.bfloat16, **meta).requires_grad_()
    weight = torch.empty(VOCABULARY, HIDDEN, dtype=torch.bfloat16, **meta).requires_grad_()
    labels = torch.empty(TOKENS, dtype=torch.long, **meta)
    old, advantages = (torch.empty(TOKENS, **meta) for _ in range(2))
    mask = torch.empty(TOKENS, dtype=torch.bool, **meta)
    return hidden, weight, labels, old, advantages, mask, torch.empty(9, dtype=torch.int32, **meta)


def test_the_head_without_logits_needs_a_tenth_of_the_eager_peak():
    hidden, weight, labels, old, advantages, mask, cu_seqlens = _inputs()
    options = {"aggregation": "token-mean", "entropy_coef": 0.01}
    with Peak() as eager:
        logprobs, entropies = logprob_entropy(hidden @ weight.t(), labels)
        loss = reference.policy_loss(logprobs, entropies, old, advantages, mask, cu_seqlens, **options).sum
        gradients = torch.autograd.grad(loss, (hidden, weight))
    del logprobs, entropies, loss, gradients
    main_grad = torch.empty(VOCABULARY, HIDDEN, device="meta")
    with Peak() as fused:
        found = linear_policy_loss(
            hidden, weight, labels, old, advantages, mask, cu_seqlens, chunk=CHUNK, main_grad=main_grad, **options
        )
        gradients = torch.autograd.grad(found.sum, (hidden, weight))
    print(f"FIGURE memory eager={eager.peak / 2**30:.2f}GiB fused={fused.peak / 2**30:.2f}GiB")
    assert eager.peak > 6 * TOKENS * VOCABULARY  # the count sees the logits and their f32 copy
    assert CHUNK * VOCABULARY * 2 < fused.peak <= 0.1 * eager.peak
    assert gradients[1].shape == weight.shape


def test_the_count_of_bytes_follows_what_is_made_and_freed():
    with Peak() as count:
        a = torch.empty(1000, device="meta")
        b = a * 2
        del b
        c = a + 1
    assert count.peak == 8000 and count.now == 8000 and c.shape == a.shape


def test_no_operator_asks_the_device_for_a_value():
    hidden, weight, labels, old, advantages, mask, _ = _inputs()
    cu_seqlens = torch.tensor([0, 100, TOKENS], dtype=torch.int32)  # on the CPU, as batches hold it
    logits = (hidden @ weight.t()).float()
    logprobs, entropies = kernel_logprob_entropy(logits, labels, inplace=True)
    for aggregation in AGGREGATIONS:
        loss = policy_loss.policy_loss(
            logprobs, entropies, old, advantages, mask, cu_seqlens, entropy_coef=0.01, dual_clip=3.0,
            advantage_mask=mask, entropy_mask=mask, aggregation=aggregation, length_norm=9.0,
        )  # fmt: skip
    (loss.sum / loss.count).backward()
    assert hidden.grad.shape == hidden.shape and set(loss.metrics) == set(reference.METRICS)
    fused = linear_policy_loss(
        hidden, weight, labels, old, advantages, mask, None, token_weights=advantages, entropy_coef=0.01,
        main_grad=torch.empty(VOCABULARY, HIDDEN, device="meta"),
    )  # fmt: skip
    fused.sum.backward()
    ensemble_gae.ensemble_gae(torch.empty(2, TOKENS, device="meta"), old, mask, cu_seqlens, lam=0.9)
