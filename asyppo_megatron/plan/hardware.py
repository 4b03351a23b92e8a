"""Figures of accelerators, as their makers state them, and the shares of them that a run reaches."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True)
class Accelerator:
    """One GPU.

    Attributes:
        memory: bytes.
        flops: dense bf16, operations a second.
        bandwidth: of its memory, bytes a second.
        link: to the other GPUs of its node, bytes a second, one way.
    """

    memory: float
    flops: float
    bandwidth: float
    link: float


ACCELERATORS = {
    "A100": Accelerator(80e9, 312e12, 2.04e12, 300e9),
    "H100": Accelerator(80e9, 989e12, 3.35e12, 450e9),
    "H200": Accelerator(141e9, 989e12, 4.8e12, 450e9),
}

# What of these figures a run reaches: assumptions, stated with every estimate of time.
TRAIN_SHARE = 0.40  # of the FLOPs, forward and backward
FORWARD_SHARE = 0.45
DECODE_SHARE = 0.60  # of the memory bandwidth
SYNC_SHARE = 0.30  # of the link
# Outside the tensors: CUDA context, communicators' buffers, workspaces, and what the allocator cannot use.
OVERHEAD_BYTES = 4 * GIB
USABLE_SHARE = 0.97
