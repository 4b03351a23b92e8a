"""The LM head without logits against float64 autograd through the whole logits."""

from __future__ import annotations

import pytest
import torch

from asyppo_megatron.kernels import linear_head, reference
from asyppo_megatron.kernels.linear_policy_loss import linear_logprob_entropy, linear_policy_loss
from asyppo_megatron.kernels.reference import Head
from asyppo_megatron.ppo.logprob import logprob_entropy

TOKENS, HIDDEN, VOCABULARY, PADDED = 21, 24, 301, 320
OPTIONS = {"entropy_coef": 0.02, "clip_high": 0.28}
SOFTMAX = {"temperature": 0.9, "num_valid": VOCABULARY}


@pytest.fixture(params=["triton", "reference"])
def operator(request):
    """The kernels' implementation, and that of plain torch."""
    return linear_policy_loss if request.param == "triton" else linear_head.linear_policy_loss


def make(device, dtype=torch.float32, tokens=TOKENS):
    hidden = torch.randn(tokens, HIDDEN).to(dtype)
    weight = (torch.randn(PADDED, HIDDEN) * 0.6).to(dtype)
    labels = torch.randint(0, VOCABULARY, (tokens,))
    exact, _ = logprob_entropy(hidden.double() @ weight.double().t(), labels, **SOFTMAX)
    old = exact.float() + 0.3 * torch.randn(tokens)
    masks = [torch.rand(tokens) < share for share in (0.8, 0.8, 0.7)]
    tensors = (hidden, weight, labels, old, torch.randn(tokens), *masks)
    return [x.to(device) for x in tensors], torch.tensor([0, 8, 9, tokens], dtype=torch.int32, device=device)


def expected(tensors, cu_seqlens, **options):
    """(PolicyLoss, gradient of hidden, of weight) of sum / count in float64, on the CPU."""
    hidden, weight, labels, old, advantages, mask, advantage_mask, entropy_mask = (x.detach().cpu() for x in tensors)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logprobs, entropies = logprob_entropy(hidden @ weight.t(), labels, **SOFTMAX)
    loss = reference.policy_loss(
        logprobs, entropies, old.double(), advantages.double(), mask, cu_seqlens.cpu(),
        advantage_mask=advantage_mask, entropy_mask=entropy_mask, **options,
    )  # fmt: skip
    return loss, *torch.autograd.grad(loss.sum / loss.count, (hidden, weight)), logprobs.detach(), entropies.detach()


def run(tensors, cu_seqlens, operator=linear_policy_loss, **options):
    """LinearPolicyLoss; hidden and weight become leaves."""
    hidden, weight, labels, old, advantages, mask, advantage_mask, entropy_mask = tensors
    return operator(
        hidden.requires_grad_(), weight.requires_grad_(), labels, old, advantages, mask, cu_seqlens,
        advantage_mask=advantage_mask, entropy_mask=entropy_mask, **SOFTMAX, **options,
    )  # fmt: skip


def relative(x, y):
    return ((x.detach().cpu().double() - y).abs().max() / y.abs().max()).item()


@pytest.mark.parametrize("chunk", [5, 64])
@pytest.mark.parametrize("kind", ["ppo", "cispo", "aspo"])
def test_loss_metrics_and_both_gradients_agree_with_float64(kind, chunk, operator, device):
    tensors, cu_seqlens = make(device)
    want = expected(tensors, cu_seqlens, kind=kind, **OPTIONS)
    found = run(tensors, cu_seqlens, operator, kind=kind, chunk=chunk, **OPTIONS)
    (found.sum / found.count).backward()
    errors = {
        "sum": relative(found.sum, want[0].sum.detach()),
        "by_hidden": relative(tensors[0].grad, want[1]),
        "by_weight": relative(tensors[1].grad, want[2]),
    }
    print(f"FIGURE linear {kind} chunk={chunk} " + " ".join(f"{k}={v:.1e}" for k, v in errors.items()))
    assert errors["sum"] <= 1e-6 and max(errors.values()) <= 2e-6
    assert found.count == want[0].count
    mask = tensors[5].cpu()
    torch.testing.assert_close(found.logprobs.cpu().double(), want[3] * mask, atol=5e-6, rtol=0)
    torch.testing.assert_close(found.entropies.cpu().double(), want[4] * mask, atol=5e-6, rtol=0)
    for name, value in want[0].metrics.items():
        torch.testing.assert_close(found.metrics[name].cpu(), value, rtol=1e-4, atol=1e-4)
    assert not tensors[1].grad[VOCABULARY:].any()


def test_main_grad_receives_the_gradient_once_and_at_the_given_scale(operator, device):
    tensors, cu_seqlens = make(device)
    want = expected(tensors, cu_seqlens, **OPTIONS)
    main_grad = torch.ones(PADDED, HIDDEN, device=device)
    scale = 1.0 / want[0].count.item()
    found = run(tensors, cu_seqlens, operator, main_grad=main_grad, grad_scale=scale, chunk=8, **OPTIONS)
    (found.sum * scale).backward()
    torch.testing.assert_close(main_grad.cpu().double() - 1.0, want[2], atol=1e-5, rtol=1e-4)
    assert tensors[1].grad.shape == (PADDED, HIDDEN) and not tensors[1].grad.any()
    assert relative(tensors[0].grad, want[1]) <= 5e-6


def test_a_backward_of_another_scale_than_main_grad_was_given_fails(device):
    if device.type != "cpu":
        pytest.skip("a failed assertion on a GPU ends the process")
    tensors, cu_seqlens = make(device)
    found = run(tensors, cu_seqlens, main_grad=torch.zeros(PADDED, HIDDEN), grad_scale=0.5)
    with pytest.raises(RuntimeError):
        found.sum.backward()


@pytest.mark.parametrize("fp32_logits", [False, True])
def test_bf16_hidden_and_weight_stay_within_what_bf16_allows(fp32_logits, device):
    tensors, cu_seqlens = make(device, torch.bfloat16)
    want = expected(tensors, cu_seqlens, **OPTIONS)
    found = run(tensors, cu_seqlens, fp32_logits=fp32_logits, chunk=8, **OPTIONS)
    (found.sum / found.count).backward()
    logprob = (found.logprobs.cpu().double() - want[3])[tensors[5].cpu()].abs().max().item()
    weight = relative(tensors[1].grad, want[2])
    print(f"FIGURE linear bf16 fp32_logits={fp32_logits} logprob={logprob:.1e} weight={weight:.1e}")
    assert logprob <= (5e-6 if fp32_logits else 0.06)
    assert weight <= (0.02 if fp32_logits else 0.1)


def test_nan_on_dead_tokens_hidden_states_included_reaches_no_gradient(operator, device):
    tensors, cu_seqlens = make(device)
    mask = tensors[5]
    want = expected(tensors, cu_seqlens, **OPTIONS)
    for x in (tensors[0], tensors[3], tensors[4]):
        x[~mask] = float("nan")
    found = run(tensors, cu_seqlens, operator, chunk=8, **OPTIONS)
    (found.sum / found.count).backward()
    assert relative(tensors[0].grad, want[1]) <= 5e-6 and relative(tensors[1].grad, want[2]) <= 5e-6
    assert not tensors[0].grad[~mask].any()


def test_old_logprobs_without_gradients_are_those_of_the_loss(device):
    tensors, cu_seqlens = make(device)
    head = Head(0.9, 0, VOCABULARY, None, 8, False)
    logprobs, entropies = linear_logprob_entropy(*tensors[:3], head)
    found = run(tensors, cu_seqlens, chunk=8)
    mask = tensors[5]
    assert torch.equal(logprobs[mask], found.logprobs[mask]) and torch.equal(entropies[mask], found.entropies[mask])


def test_weights_of_the_caller_take_the_place_of_the_aggregation(operator, device):
    tensors, cu_seqlens = make(device)
    want = expected(tensors, cu_seqlens, **OPTIONS)
    weights, count = reference.token_weights(tensors[5], cu_seqlens, "seq-mean-token-mean")
    found = run(tensors, None, operator, token_weights=weights / count, chunk=8, **OPTIONS)
    found.sum.backward()
    assert found.count is None and relative(found.sum, want[0].sum.detach() / want[0].count) <= 5e-6
    assert relative(tensors[0].grad, want[1]) <= 5e-6 and relative(tensors[1].grad, want[2]) <= 5e-6


def test_zero_tokens_give_zero(operator, device):
    tensors, _ = make(device)
    empty = [tensors[0][:0], tensors[1], *(x[:0] for x in tensors[2:])]
    found = run([x.detach() for x in empty], torch.zeros(1, dtype=torch.int32, device=device), operator)
    found.sum.backward()
    assert found.sum == 0 and found.count == 0 and found.logprobs.shape == (0,)
