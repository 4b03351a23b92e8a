"""Files between the ranks and the tests of parity, and how far two sets of tensors are apart. Not a test file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

TIED_COPY = "last stage: "  # prefix of the embedding's name in a tied pipeline's last stage


def write(path: Path, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """Tensors and JSON-able facts of one rank."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, path.with_suffix(".safetensors"))
    path.with_suffix(".json").write_text(json.dumps(facts))


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return load_file(path.with_suffix(".safetensors")), json.loads(path.with_suffix(".json").read_text())


def part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Tensors whose names begin with `prefix`/, without it."""
    return {n.removeprefix(f"{prefix}/"): t for n, t in tensors.items() if n.startswith(f"{prefix}/")}


def counterpart(name: str, expected: dict[str, torch.Tensor]) -> torch.Tensor:
    """The tensor to compare with; a tied pipeline's copy has the original's where there is no copy."""
    return expected[name if name in expected else name.removeprefix(TIED_COPY)]


def worst_gradient(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Largest deviation of any element, as a fraction of its tensor's maximum."""
    deviations = []
    for name, gradient in found.items():
        reference = counterpart(name, expected)
        assert gradient.shape == reference.shape, name
        deviations.append((float((gradient - reference).abs().max() / reference.abs().max()), name))
    return max(deviations)


def worst_update(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Largest relative L2 distance of any tensor's update."""
    deviations = []
    for name, update in found.items():
        reference = counterpart(name, expected)
        deviations.append((float((update - reference).norm() / reference.norm()), name))
    return max(deviations)
