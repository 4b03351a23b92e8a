"""The loss kernel against the float64 reference: values, both gradients, metrics, masks, bounds."""

from __future__ import annotations

import pytest
import torch

from asyppo_megatron.kernels import policy_loss as module
from asyppo_megatron.kernels import reference
from asyppo_megatron.kernels.policy_loss import policy_loss

NAN = float("nan")
CU_SEQLENS = [0, 7, 7, 30, 31, 60]
LIMITS = {"clip_low": 0.2, "clip_high": 0.28}


@pytest.fixture(autouse=True)
def _several_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 16)


def make(device, count=60, cu_seqlens=CU_SEQLENS):
    old = -torch.rand(count) * 4
    new = old + torch.randn(count) * 0.5
    if count > 5:
        # Beyond the bound on the log-ratio, then beyond ASPO's, then nearly on-policy.
        new[:5] = old[:5] + torch.tensor([25.0, -25.0, 1.5, -1.5, 1e-4])
    masks = [torch.rand(count) < share for share in (0.8, 0.8, 0.7)]
    masks[0][:5] = True
    tensors = [new, torch.rand(count) * 3, old, torch.randn(count), *masks]
    return [x.to(device) for x in tensors], torch.tensor(cu_seqlens, dtype=torch.int32)


def evaluate(function, tensors, cu_seqlens, dtype, **options):
    """(PolicyLoss, gradient by logprobs, gradient by entropies) of the loss sum / count."""
    new, entropies, old, advantages, mask, advantage_mask, entropy_mask = tensors
    new, entropies = (x.detach().to(dtype, copy=True).requires_grad_() for x in (new, entropies))
    options = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    found = function(
        new, entropies, old.to(dtype), advantages.to(dtype), mask, cu_seqlens.to(mask.device),
        advantage_mask=advantage_mask, entropy_mask=entropy_mask, **options,
    )  # fmt: skip
    if mask.numel():
        (found.sum / found.count.clamp(min=1)).backward()
    zero = torch.zeros_like(new)
    return found, zero if new.grad is None else new.grad, zero if entropies.grad is None else entropies.grad


def compare(name, tensors, cu_seqlens, **options):
    """Kernel in f32 against the reference in f64 on the same f32 numbers."""
    expected = evaluate(reference.policy_loss, tensors, cu_seqlens, torch.float64, **options)
    found = evaluate(policy_loss, tensors, cu_seqlens, torch.float32, **options)
    scale = expected[0].sum.abs().clamp(min=1.0)
    errors = {"sum": ((found[0].sum - expected[0].sum).abs() / scale).item()}
    for key, x, y in (("by_logprob", found[1], expected[1]), ("by_entropy", found[2], expected[2])):
        errors[key] = ((x - y).abs().max() / y.abs().max().clamp(min=1e-3)).item() if y.numel() else 0.0
    print(f"FIGURE policy_loss {name} " + " ".join(f"{k}={v:.1e}" for k, v in errors.items()))
    assert found[0].count == expected[0].count
    assert errors["sum"] <= 1e-6 and errors["by_logprob"] <= 2e-6 and errors["by_entropy"] <= 2e-6
    for key, value in expected[0].metrics.items():
        torch.testing.assert_close(found[0].metrics[key], value, rtol=2e-6, atol=1e-6)
    return found, expected


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "ppo", **LIMITS},
        {"kind": "ppo", "dual_clip": 3.0, **LIMITS},
        {"kind": "cispo", "clip_low": 1.0, "clip_high": 0.28},
        {"kind": "aspo", "clip_low": 0.2, "clip_high": 0.2},
    ],
    ids=["ppo", "dual-clip", "cispo", "aspo"],
)
def test_every_separable_kind_agrees_with_float64(options, device):
    tensors, cu_seqlens = make(device)
    compare(options["kind"], tensors, cu_seqlens, entropy_coef=0.01, **options)


@pytest.mark.parametrize(
    "aggregation", ["seq-mean-token-mean", "token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
)
def test_every_aggregation_agrees_with_float64(aggregation, device):
    tensors, cu_seqlens = make(device)
    compare(aggregation, tensors, cu_seqlens, aggregation=aggregation, length_norm=32.0, entropy_coef=0.1)


def test_bounds_may_differ_from_token_to_token(device):
    tensors, cu_seqlens = make(device)
    bound = torch.where(torch.rand(60) < 0.2, 0.4, 0.2).to(device)
    compare("bounds", tensors, cu_seqlens, kind="aspo", clip_low=bound, clip_high=bound)


def test_a_known_token_gives_the_hand_computed_loss_gradients_and_metrics(device):
    """r = 1.1, A = 2, H = 0.5, beta = 0.1: loss -(2.2 + 0.05), by logprob -2.2, by entropy -0.1."""
    log = torch.tensor([1.1]).log().item()
    tensors = [torch.tensor(x, device=device) for x in ([log], [0.5], [0.0], [2.0], [True], [True], [True])]
    found, by_logprob, by_entropy = evaluate(
        policy_loss, tensors, torch.tensor([0, 1], dtype=torch.int32), torch.float32, entropy_coef=0.1
    )
    assert found.sum.item() == pytest.approx(-2.25, rel=1e-6) and found.count == 1
    assert by_logprob.item() == pytest.approx(-2.2, rel=1e-6) and by_entropy.item() == pytest.approx(-0.1, rel=1e-6)
    assert found.metrics["kl"].item() == pytest.approx(0.1 - log, rel=1e-5)
    assert found.metrics["clipped"] == 0 and found.metrics["ratio"].item() == pytest.approx(1.1, rel=1e-6)


def test_nan_on_dead_tokens_reaches_nothing(device):
    tensors, cu_seqlens = make(device)
    clean = evaluate(policy_loss, tensors, cu_seqlens, torch.float32, entropy_coef=0.01)
    for x in tensors[:4]:
        x[~tensors[4]] = NAN
    found = evaluate(policy_loss, tensors, cu_seqlens, torch.float32, entropy_coef=0.01)
    assert torch.equal(found[0].sum, clean[0].sum) and torch.equal(found[1], clean[1])
    assert all(torch.equal(found[0].metrics[k], v) for k, v in clean[0].metrics.items())
    assert (found[1][~tensors[4]] == 0).all() and (found[2][~tensors[4]] == 0).all()


def test_nan_on_a_live_token_reaches_the_loss(device):
    tensors, cu_seqlens = make(device)
    tensors[0][10], tensors[4][10], tensors[5][10] = NAN, True, True
    for kind in reference.SEPARABLE:
        assert evaluate(policy_loss, tensors, cu_seqlens, torch.float32, kind=kind)[0].sum.isnan()


@pytest.mark.parametrize(("count", "cu_seqlens"), [(0, [0]), (0, [0, 0]), (1, [0, 1])])
def test_zero_tokens_and_one(count, cu_seqlens, device):
    tensors, cu_seqlens = make(device, count, cu_seqlens)
    tensors[4].fill_(True)
    compare(f"{count} tokens", tensors, cu_seqlens)


def test_without_trainable_tokens_everything_is_zero(device):
    tensors, cu_seqlens = make(device)
    tensors[4].fill_(False)
    found, by_logprob, by_entropy = evaluate(policy_loss, tensors, cu_seqlens, torch.float32, entropy_coef=0.01)
    assert found.sum == 0 and found.count == 0 and not by_logprob.any() and not by_entropy.any()
    assert all(value == 0 for value in found.metrics.values())


def test_without_entropies_only_the_policy_term_remains(device):
    (new, _, old, advantages, mask, *_), cu_seqlens = make(device)
    found = policy_loss(new.requires_grad_(), None, old, advantages, mask, cu_seqlens.to(device))
    expected = reference.policy_loss(new.detach().double(), None, old, advantages, mask, cu_seqlens)
    torch.testing.assert_close(found.sum.double(), expected.sum, rtol=1e-6, atol=1e-6)
    assert found.metrics["entropy"] == 0 and found.metrics["entropy_tokens"] == 0


def test_bf16_inputs_are_computed_in_f32(device):
    tensors, cu_seqlens = make(device)
    rounded = [x.bfloat16() if x.is_floating_point() else x for x in tensors]
    found = evaluate(policy_loss, rounded, cu_seqlens, torch.bfloat16, entropy_coef=0.01)
    expected = evaluate(reference.policy_loss, rounded, cu_seqlens, torch.float64, entropy_coef=0.01)
    torch.testing.assert_close(found[0].sum.double(), expected[0].sum, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-2, atol=1e-6)


def test_kinds_that_need_a_response_and_bad_settings_are_refused(device):
    tensors, cu_seqlens = make(device)
    for kind in ("gspo", "asympo", "spo"):
        with pytest.raises(ValueError, match="policy loss kernel"):
            evaluate(policy_loss, tensors, cu_seqlens, torch.float32, kind=kind)
    with pytest.raises(ValueError, match="dual_clip"):
        evaluate(policy_loss, tensors, cu_seqlens, torch.float32, dual_clip=1.0)
    with pytest.raises(ValueError, match="aggregation"):
        evaluate(policy_loss, tensors, cu_seqlens, torch.float32, aggregation="mean")
