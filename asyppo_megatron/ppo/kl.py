"""Per-token estimators of KL(policy || reference) from the tokens that the policy sampled (Schulman, 2020)."""

from __future__ import annotations

import torch

# |log ratio| beyond this is a broken score, not a policy: exp() of it would only turn a loss into inf.
MAX_LOG_RATIO = 20.0

KL_KINDS = ("k1", "k2", "k3")


def kl_estimate(logprobs: torch.Tensor, reference_logprobs: torch.Tensor, kind: str) -> torch.Tensor:
    """Estimate the KL divergence of the policy from the reference at every token.

    With d = logprob - reference_logprob:

        k1 = d                   unbiased, any sign, the usual choice inside a reward
        k2 = d^2 / 2             biased, its gradient is that of the true KL
        k3 = exp(-d) - 1 + d     unbiased, never negative, the usual choice inside a loss (GRPO)

    Args:
        logprobs: f32 [T], nats.
        reference_logprobs: f32 [T], nats.
        kind: "k1", "k2" or "k3".

    Returns:
        f32 [T], nats.
    """
    difference = logprobs - reference_logprobs
    if kind == "k1":
        return difference
    if kind == "k2":
        return 0.5 * difference.square()
    if kind == "k3":
        reverse = (-difference).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return torch.expm1(reverse) - reverse
    raise ValueError(f"KL estimator: got {kind!r}, need one of {', '.join(KL_KINDS)}")
