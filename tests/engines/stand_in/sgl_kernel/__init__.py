"""Stand-in for the CPU build of SGLang's kernels (not on the package index), in plain torch.

With the backends `torch_native` and `pytorch` SGLang 0.5.23 calls two of its kernels on a CPU; both are here. Any other
is refused by name when it is called. For tests: it is put on the servers' PYTHONPATH and belongs to no product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

__version__ = "0.4.10"
_MASK = (1 << 32) - 1
_library = torch.library.Library("sgl_kernel", "DEF")


def assign_req_to_token_pool_cpu(
    requests: torch.Tensor,
    table: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    locations: torch.Tensor,
    width: int,
) -> None:
    """Write the cache locations of new tokens into the rows of their requests: table[r, start:end] = the next ones."""
    begin = 0
    for request, start, end in zip(requests.tolist(), starts.tolist(), ends.tolist(), strict=True):
        table[request, start:end] = locations[begin : begin + end - start].to(table.dtype)
        begin += end - start


def _rotate(x: torch.Tensor, bits: int) -> torch.Tensor:
    return ((x << bits) | (x >> (32 - bits))) & _MASK


def _absorb(state: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
    """One round of MurmurHash3 (x86, 32 bits), in int64 modulo 2^32."""
    word = (_rotate((word * 0xCC9E2D51) & _MASK, 15) * 0x1B873593) & _MASK
    return (_rotate(state ^ word, 13) * 5 + 0xE6546B64) & _MASK


def _murmur_hash32(seed: torch.Tensor, positions: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """MurmurHash3 of (seed: two words, position, column), uint32 [len(seed), len(columns)]."""
    seed = seed.to(torch.int64)
    state = _absorb(torch.zeros_like(seed), seed & _MASK)
    state = _absorb(state, (seed >> 32) & _MASK)
    state = _absorb(state, positions.to(torch.int64) & _MASK)[:, None]
    state = _absorb(state, (columns.to(torch.int64) & _MASK)[None, :]) ^ 16  # 16: bytes hashed
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        state = ((state ^ (state >> shift)) * factor) & _MASK
    return (state ^ (state >> 16)).to(torch.uint32)


_library.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor col_indices) -> Tensor")
_library.impl("murmur_hash32_cpu", _murmur_hash32, "CPU")


def __getattr__(name: str) -> Callable[..., None]:
    """SGLang imports dozens of names at start and calls none of them here."""
    if not name.endswith("_cpu"):
        raise AttributeError(name)

    def absent(*args: object, **kwargs: object) -> None:
        raise NotImplementedError(f"sgl_kernel.{name}: not in the tests' stand-in")

    return absent
