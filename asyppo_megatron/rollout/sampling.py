"""Sampling of one token a row, reproducible from one uniform number a row."""

from __future__ import annotations

import numpy as np
import torch


def request_uniforms(seed: int, count: int) -> np.ndarray:
    """f64 [count] in [0, 1): the random numbers of one request; number t depends on (seed, t) alone."""
    return np.random.Generator(np.random.Philox(key=seed)).random(count)


def sample(
    logits: torch.Tensor, uniforms: torch.Tensor, temperature: float, top_p: float = 1.0, top_k: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Draw one token a row by inverting the cumulative distribution at a given uniform number.

    p = softmax(logits / temperature) in fp32. A token is kept when fewer than top_k tokens are more probable
    and these have together less mass than top_p; both rules look at p itself, as SGLang does (Hugging Face
    applies top_p to the renormalised top_k). The most probable token is always kept.

    Args:
        logits: [B, V].
        uniforms: f64 [B] in [0, 1).
        temperature: 0 takes the most probable token.
        top_p: nucleus mass, 1 switches it off.
        top_k: 0 switches it off.

    Returns:
        tokens i64 [B]; logprobs f32 [B] of p, before the filters (temperature 1 where greedy);
        kept mass f32 [B], or None where no filter ran.
    """
    logits = logits.float()  # softmax in fp32 whatever the model computes in
    if temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0], None
    scaled = logits / temperature
    total = scaled.logsumexp(-1, keepdim=True)
    vocabulary = logits.size(1)
    if top_p >= 1 and not 0 < top_k < vocabulary:
        tokens, kept = _invert((scaled - total).exp_(), uniforms), None
    else:
        top, ids = scaled.topk(min(top_k, vocabulary)) if top_k else scaled.sort(-1, descending=True)
        top = (top - total).exp_()
        if top_p < 1:
            top = torch.where(top.cumsum(-1) - top < top_p, top, 0.0)
        tokens, kept = ids.gather(1, _invert(top, uniforms)[:, None])[:, 0], top.sum(-1)
    return tokens, (scaled.gather(1, tokens[:, None]) - total)[:, 0], kept


def _invert(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """First column at which the cumulative weight exceeds uniform x total, i64 [B]; never one of weight 0."""
    cdf = weights.cumsum(-1, dtype=torch.float64)  # a sum over 150,000 entries would drift in fp32
    target = uniforms * cdf[:, -1] * (1 - 1e-12)
    return torch.searchsorted(cdf, target[:, None], right=True)[:, 0].clamp_(max=weights.size(1) - 1)
