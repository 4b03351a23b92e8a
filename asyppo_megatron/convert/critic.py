"""The value head that a mini-critic starts with."""

from __future__ import annotations

import torch
from torch import Tensor


def initial_value_head(hidden_size: int, seed: int | None) -> tuple[Tensor, Tensor]:
    """Weight f32 [1, H] and bias f32 [1] of a new head.

    Values are about +-0.1 for unit-variance hidden states, or zero when `seed` is None. Drawn on the CPU in fp32 by
    a generator of its own: the same everywhere, in every layout.
    """
    if seed is None:
        return torch.zeros(1, hidden_size), torch.zeros(1)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, hidden_size, generator=generator) * (0.1 * hidden_size**-0.5), torch.zeros(1)
