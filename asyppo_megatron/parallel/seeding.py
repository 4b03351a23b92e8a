"""Seeds that depend on what is drawn, never on which rank or in which order it is drawn."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def derive_seed(*parts: object) -> int:
    """A 63-bit seed keyed by its parts, e.g. `derive_seed(config.seed, "critic_head", m)`."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_process(seed: int) -> None:
    """Seed every generator of this process; all ranks use the same seed, since nothing samples in training."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
