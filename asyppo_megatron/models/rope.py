"""Rotary position frequencies, as Hugging Face computes them."""

from __future__ import annotations

import math
from typing import Any

import torch


def inverse_frequencies(head_dim: int, theta: float, scaling: dict[str, Any] | None) -> torch.Tensor:
    """Rotary frequencies f32 [head_dim / 2], radians a token.

    Args:
        theta: base of the geometric series.
        scaling: None, or the numbers of Llama 3's rule: wavelengths beyond the original context are stretched
            by `factor`, those in between interpolated.
    """
    inv = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if scaling is None:
        return inv
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inv
    smooth = (context / wavelength - low) / (high - low)
    stretched = torch.where(wavelength > context / low, inv / factor, inv)
    between = (1 - smooth) * inv / factor + smooth * inv
    is_between = (wavelength >= context / high) & (wavelength <= context / low)
    return torch.where(is_between, between, stretched)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotary embedding. x [t, heads, d]; cos, sin [t, 1, d] in x's dtype."""
    half = x.size(-1) // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin
