"""Buckets to engines on the same machine, without copying them: shared memory on a CPU, CUDA IPC on a GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from asyppo_megatron.weight_sync.buckets import BucketPlan
from asyppo_megatron.weight_sync.engines import EngineError, Request


def require_sglang() -> None:
    """The pickles that engines take name SGLang's own classes.

    Raises:
        EngineError: SGLang cannot be imported here.
    """
    try:
        import sglang.srt.weight_sync.tensor_bucket  # noqa: F401
    except ImportError as e:
        raise EngineError(
            f"weight_sync.transport: got ipc where sglang cannot be imported ({e}), need it in the trainer's "
            "environment for this transport; install the sglang extra or choose collective or disk"
        ) from e


def allocate_shared(num_bytes: int) -> Tensor:
    """A buffer (u8) that an unrelated process can open by name."""
    with _by_name():
        return torch.empty(num_bytes, dtype=torch.uint8).share_memory_()


@contextmanager
def _by_name() -> Iterator[None]:
    """CPU tensors are shared as named files while this lasts: descriptors only travel to relatives.

    The process that torch starts to keep the names gets no part of our output: it would hold a pipe open.
    """
    before = mp.get_sharing_strategy()
    mp.set_sharing_strategy("file_system")
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(fd) for fd in (1, 2)]
    null = os.open(os.devnull, os.O_WRONLY)
    for fd in (1, 2):
        os.dup2(null, fd)
    os.close(null)
    try:
        yield
    finally:
        for fd, saved in zip((1, 2), kept, strict=True):
            os.dup2(saved, fd)
            os.close(saved)
        mp.set_sharing_strategy(before)


@dataclass(frozen=True)
class Neighbour:
    """An engine whose tp ranks lie beside ranks of the actor.

    Attributes:
        owners: for each of its tp ranks, the world rank on the same GPU; on a CPU -1, for the sender of the bucket.
    """

    url: str
    owners: tuple[int, ...]

    @property
    def poster(self) -> int:
        """The rank that speaks to it: the first owner, -1 for the sender."""
        return self.owners[0]


def pack(plan: BucketPlan, flat: Tensor) -> str:
    """A bucket as an engine's update_weights_from_tensor takes it: a handle of the memory, and what lies where."""
    from sglang.srt.utils import MultiprocessingSerializer
    from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorMetadata

    if flat.device.type == "cuda":
        monkey_patch_torch_reductions()  # SGLang's: names the GPU by UUID, since engines may number them otherwise
    metadata = [
        FlattenedTensorMetadata(
            name=s.name,
            shape=torch.Size(s.shape),
            dtype=s.dtype,
            start_idx=s.offset,
            end_idx=s.offset + s.num_bytes,
            numel=s.num_bytes,
        )
        for s in plan.slots
    ]
    with _by_name():
        return MultiprocessingSerializer.serialize({"flattened_tensor": flat, "metadata": metadata}, output_str=True)


def send_bucket(
    plan: BucketPlan,
    flat: Tensor,
    neighbours: Sequence[Neighbour],
    *,
    is_sender: bool,
    store: dist.Store,
    prefix: str,
    timeout_s: float,
) -> None:
    """Hand a bucket that lies in `flat` on this rank to the engines beside it; returns when they have loaded it.

    On a CPU the sender does it alone. On a GPU every owner has the bucket on its own GPU, makes the handle for its
    engine rank, and passes it to the one that speaks to the engine.

    Args:
        prefix: of keys in the store, unique to the bucket.
    """
    me = dist.get_rank()
    posts: list[Request] = []
    for number, engine in enumerate(neighbours):
        mine = {
            r: pack(plan, flat) for r, owner in enumerate(engine.owners) if owner == me or (owner < 0 and is_sender)
        }
        if engine.poster == me or (engine.poster < 0 and is_sender):
            payload = [
                mine[r] if r in mine else store.get(f"{prefix}/{number}/{r}").decode()
                for r in range(len(engine.owners))
            ]
            body = {"serialized_named_tensors": payload, "load_format": "flattened_bucket", "flush_cache": False}
            posts.append(Request(engine.url, "POST", "/update_weights_from_tensor", body, timeout_s))
        else:
            for r, text in mine.items():
                store.set(f"{prefix}/{number}/{r}", text)
    for post in posts:
        post.answer()
