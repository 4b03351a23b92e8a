"""The device of the kernels' tests: "cpu" under Triton's interpreter, "cuda" where the parent says so."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

# The layouts' parity with Hugging Face is tested with these kernels too.
sys.path.append(str(Path(__file__).parents[2] / "distributed"))

DEVICE = os.environ.get("ASYPPO_KERNEL_DEVICE", "cpu")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device(DEVICE)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
