"""The softmax kernel on one shard against float64: shapes, types, temperatures, dead rows, padding."""

from __future__ import annotations

import pytest
import torch
from softmax_cases import check, figures, truth

from asyppo_megatron.kernels import softmax
from asyppo_megatron.kernels.logprob_entropy import logprob_entropy
from asyppo_megatron.ppo import logprob as reference

NAN, INF = float("nan"), float("inf")


def run(logits, labels, grad_logprobs, grad_entropies, **options):
    """(logprobs, entropies, gradient) of an operator."""
    leaf = logits.clone().requires_grad_()
    # A copy stands for the LM head's output: in place may only overwrite what no one else holds.
    logprobs, entropies = logprob_entropy(leaf * 1 if options.get("inplace") else leaf, labels, **options)
    torch.autograd.backward([logprobs, entropies], [grad_logprobs, grad_entropies])
    return logprobs, entropies, leaf.grad


def make(rows, width, device, *, scale=3.0, shift=20.0, dtype=torch.float32):
    logits = (torch.randn(rows, width) * scale + shift).to(dtype).to(device)
    labels = torch.randint(0, width, (rows,), device=device)
    return logits, labels, torch.randn(rows).to(device), (3 * torch.randn(rows)).to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("scale", "temperature", "rows", "width"),
    [
        (3.0, 1.0, 5, 4096),  # a whole tile and nothing else
        (3.0, 0.99, 7, 1000),  # less than a tile
        (8.0, 0.7, 3, 9001),  # tiles in several programs, then a ragged one
        (0.1, 1.0, 1, 8192),  # one token, nearly uniform
        (30.0, 1.3, 9, 777),  # peaked
    ],
)
def test_agrees_with_float64_forward_and_backward(dtype, scale, temperature, rows, width, device):
    logits, labels, a, b = make(rows, width, device, scale=scale, dtype=dtype)
    if rows > 4:
        logits[3] = -100.0
        logits[3, 7] = 0.0  # a certain token: entropy 0
        logits[4, 5:50] = -INF  # tokens that a mask has removed
        labels[4] = 2
    found = run(logits, labels, a, b, temperature=temperature)
    errors = figures(found, truth(logits, labels, temperature, a, b))
    name = f"tp1 {str(dtype)[6:]} scale={scale} T={temperature} {rows}x{width}"
    check(name, errors, logits, temperature, device.type == "cuda")
    inplace = run(logits, labels, a, b, temperature=temperature, inplace=True)
    assert torch.equal(inplace[2], found[2])


def test_several_tiles_in_one_program_agree_with_float64(device, monkeypatch):
    monkeypatch.setattr(softmax, "FULL_GRID", 1)
    logits, labels, a, b = make(3, 9001, device, scale=8.0)
    check("tp1 one program", figures(run(logits, labels, a, b), truth(logits, labels, 1.0, a, b)), logits, 1.0, False)


def test_rows_without_gradient_give_zeros_whatever_they_hold(device):
    logits, labels, a, b = make(6, 1000, device)
    a[[1, 2, 3]], b[[1, 2, 3]] = 0.0, 0.0
    expected = truth(logits, labels, 1.0, a, b)[2]
    logits[1], logits[2, 5], logits[3, ::2] = NAN, INF, -INF
    for inplace in (False, True):
        gradient = run(logits, labels, a, b, inplace=inplace)[2]
        assert (gradient[1:4] == 0).all()
        torch.testing.assert_close(gradient.cpu().double(), expected, atol=2e-6, rtol=0)


def test_nan_in_a_live_row_is_not_hidden_and_stays_in_its_row(device):
    logits, labels, a, b = make(4, 1000, device)
    logits[2, 77] = NAN
    logprobs, entropies, gradient = run(logits, labels, a, b)
    assert logprobs[2].isnan() and entropies[2].isnan() and gradient[2].isnan().all()
    others = torch.tensor([0, 1, 3], device=device)
    assert logprobs[others].isfinite().all() and gradient[others].isfinite().all()


@pytest.mark.parametrize("num_valid", [1, 900, 4096])
def test_columns_that_pad_the_vocabulary_are_excluded_and_get_zero(num_valid, device):
    logits, _, a, b = make(3, 5000, device)
    labels = torch.randint(0, num_valid, (3,), device=device)
    expected = truth(logits[:, :num_valid], labels, 1.0, a, b)
    logits[:, num_valid:] = NAN
    found = run(logits, labels, a, b, num_valid=num_valid)
    assert (found[2][:, num_valid:] == 0).all()
    torch.testing.assert_close(found[0].cpu().double(), expected[0], atol=5e-6, rtol=0)
    torch.testing.assert_close(found[1].cpu().double(), expected[1], atol=5e-6, rtol=0)
    torch.testing.assert_close(found[2][:, :num_valid].cpu().double(), expected[2], atol=4e-6, rtol=0)


def test_zero_tokens_give_empty_results_and_gradients(device):
    logits = torch.empty(0, 100, device=device, requires_grad=True)
    logprobs, entropies = logprob_entropy(logits, torch.empty(0, dtype=torch.long, device=device))
    (logprobs.sum() + entropies.sum()).backward()
    assert logprobs.shape == entropies.shape == (0,) and logits.grad.shape == (0, 100)


def test_rows_past_two_to_the_31_elements_are_addressed(device):
    """A row stride of 2^31 - 2^20 elements: the second and third row lie past what 32 bits can address."""
    stride, width = 2**31 - 2**20, 64
    storage = torch.empty(2 * stride + width, dtype=torch.bfloat16, device="meta" if device.type == "cpu" else device)
    if storage.is_meta:  # memory that is reserved and never touched, but for three rows
        import mmap

        storage = torch.frombuffer(mmap.mmap(-1, storage.numel() * 2), dtype=torch.bfloat16)
    logits = storage.as_strided((3, width), (stride, 1))
    logits.copy_(torch.randn(3, width))
    labels = torch.tensor([0, 5, 63], device=device)
    logits.requires_grad_()
    logprobs, entropies = logprob_entropy(logits, labels, inplace=True)
    ones = torch.ones(3, device=device)
    expected = truth(logits, labels, 1.0, ones, ones)
    torch.testing.assert_close(logprobs.cpu().double(), expected[0], atol=5e-6, rtol=0)
    gradient = torch.autograd.grad([logprobs, entropies], logits, [ones, ones])[0]
    torch.testing.assert_close(gradient.cpu().double(), expected[2], atol=4e-3, rtol=1e-2)


@pytest.mark.parametrize("operator", [logprob_entropy, reference.logprob_entropy], ids=["kernel", "reference"])
def test_infinitely_unlikely_logits_have_probability_zero_and_no_entropy(operator, device):
    logits = torch.randn(3, 40, device=device)
    logits[0, 3:] = -INF  # three entries left
    logits[1, 5] = -INF  # its own label
    logits[2, 1:] = -INF  # certainty
    labels = torch.tensor([1, 5, 0], device=device)
    finite = torch.where(logits == -INF, -1e4, logits).double().requires_grad_()
    expected = reference.logprob_entropy(finite, labels)
    leaf = logits.requires_grad_()
    logprobs, entropies = operator(leaf, labels)
    assert logprobs[1] == -INF and logprobs[2] == 0 and entropies[2] == 0
    torch.testing.assert_close(entropies.double(), expected[1], atol=1e-6, rtol=0)
    torch.testing.assert_close(logprobs[[0, 2]].double(), expected[0][[0, 2]], atol=1e-6, rtol=0)
    weights = torch.tensor([0.7, 0.0, -0.4], device=device)
    (weights * logprobs.nan_to_num(neginf=0.0) + 2 * entropies).sum().backward()
    (weights * expected[0] + 2 * expected[1]).sum().backward()
    torch.testing.assert_close(leaf.grad.double(), finite.grad, atol=1e-6, rtol=0)


def test_agrees_with_the_plain_torch_reference(device):
    logits, labels, a, b = make(5, 1234, device)
    labels.clamp_(max=1199)
    leaf = logits.clone().requires_grad_()
    expected = reference.logprob_entropy(leaf, labels, temperature=0.9, num_valid=1200)
    torch.autograd.backward(expected, [a, b])
    found = run(logits, labels, a, b, temperature=0.9, num_valid=1200)
    for x, y in zip(found, [*expected, leaf.grad], strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


def test_a_second_backward_over_overwritten_logits_is_refused(device):
    logits, labels, _, _ = make(2, 100, device)
    logprobs, _ = logprob_entropy(logits.requires_grad_() * 1, labels, inplace=True)
    logprobs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="overwrote the logits"):
        logprobs.sum().backward()


def test_wrong_types_and_temperatures_are_refused(device):
    logits, labels, _, _ = make(2, 100, device)
    with pytest.raises(ValueError, match="need float32, bfloat16 or float16"):
        logprob_entropy(logits.double(), labels)
    with pytest.raises(ValueError, match="temperature"):
        logprob_entropy(logits, labels, temperature=0.0)
