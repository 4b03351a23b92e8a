"""Sums of a step that stay on the device until its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def add_to(sums: torch.Tensor, names: Sequence[str], **values: Any) -> None:
    """Add numbers or 0-dim tensors to the entries of `sums` f64 [names] that they are named after; never waits."""
    for name, value in values.items():
        sums[names.index(name)] += value
