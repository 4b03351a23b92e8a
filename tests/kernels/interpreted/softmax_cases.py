"""The float64 truth of logprob and entropy, its gradients, and the accuracy that is asked of the kernels."""

from __future__ import annotations

import torch


def truth(
    logits: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    grad_logprobs: torch.Tensor,
    grad_entropies: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logprobs, entropies, gradient of the logits) in float64 on the CPU; -inf logits have probability 0."""
    z = logits.detach().cpu().double() / temperature
    logp = torch.log_softmax(z, -1)
    p = logp.exp()
    finite = torch.where(p > 0, logp, 0.0)
    entropy = -(p * finite).sum(-1)
    hot = torch.zeros_like(p).scatter_(1, labels.cpu()[:, None], 1.0)
    from_logprob, from_entropy = grad_logprobs.cpu().double()[:, None], grad_entropies.cpu().double()[:, None]
    gradient = (from_logprob * (hot - p) - from_entropy * p * (finite + entropy[:, None])) / temperature
    return logp.gather(1, labels.cpu()[:, None])[:, 0], entropy, gradient


def magnitude(logits: torch.Tensor) -> float:
    """max(1, largest finite |x| / 20), the scale of the forward bound."""
    finite = logits.detach().double()
    return max(1.0, finite[torch.isfinite(finite)].abs().max().item() / 20)


def figures(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> dict[str, float]:
    """Errors of (logprobs, entropies, gradient): absolute, absolute, relative to the largest, relative in norm."""
    logprob, entropy, gradient = (x.detach().cpu().double() for x in found)
    error = gradient - expected[2]
    return {
        "logprob": (logprob - expected[0]).abs().max().item(),
        "entropy": (entropy - expected[1]).abs().max().item(),
        "gradient": (error.abs().max() / expected[2].abs().max()).item(),
        "gradient_norm": (error.norm() / expected[2].norm()).item(),
    }


def check(name: str, errors: dict[str, float], logits: torch.Tensor, temperature: float, on_gpu: bool) -> None:
    """Hold the errors against the bounds, and print them beside (pytest -s, or the failure, shows them)."""
    print(f"FIGURE {name} " + " ".join(f"{key}={value:.1e}" for key, value in errors.items()))
    scale = magnitude(logits)
    assert errors["logprob"] <= 5e-6 * max(scale, scale / temperature), name
    assert errors["entropy"] <= 5e-6 * max(scale, scale / temperature), name
    if logits.dtype == torch.float32:
        assert errors["gradient"] <= 2e-6 * max(1.0, scale / temperature), name
    elif logits.dtype == torch.bfloat16:
        # The interpreter cuts bits off where a GPU rounds: up to twice the error.
        assert errors["gradient_norm"] <= (2.5e-3 if on_gpu else 6e-3), name
