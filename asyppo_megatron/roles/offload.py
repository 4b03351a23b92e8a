"""A role's tensors to host memory and back, so that engines can have the GPU meanwhile.

Storages move, not tensors: every view, bucket and optimizer group that shares a storage goes with it and finds it
again unchanged. On a GPU the host copies are pinned and are kept for the next time. On a CPU the same path runs with
the storages emptied and filled again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Part = Literal["weights", "gradients", "optimizer"]
PARTS: tuple[Part, ...] = ("weights", "gradients", "optimizer")
MOVED: dict[str, tuple[Part, ...]] = {"none": (), "optimizer": ("gradients", "optimizer"), "all": PARTS}


@dataclass
class _Away:
    """A storage that is not on its device: where its bytes are."""

    storage: torch.UntypedStorage
    num_bytes: int
    copy: Tensor | None  # u8; None where the contents do not matter


class Offloader:
    """Moves the parts of one role between its device and the host.

    Args:
        module: its model.
        ddp: Megatron's wrapper of it, which owns the buffers of weights and gradients; None for a frozen model.
        optimizer: Megatron's; None for a frozen model.
    """

    def __init__(self, module: nn.Module, ddp: Any = None, optimizer: Any = None):
        self._module, self._ddp, self._optimizer = module, ddp, optimizer
        self._device = next(module.parameters()).device
        self._away: dict[Part, list[_Away]] = {}
        self._kept: dict[int, Tensor] = {}  # host memory by the storage's first owner, for the next time

    @property
    def away(self) -> set[Part]:
        """Parts that are on the host now."""
        return set(self._away)

    def offload(self, parts: Iterable[Part]) -> int:
        """Move parts to the host; those that are there stay. Returns the bytes freed on the device.

        Gradients are not copied: they are zeroed before they are used again.
        """
        freed = 0
        for part in parts:
            if part in self._away:
                continue
            moved = []
            for key, storage in self._storages(part):
                copy = None if part == "gradients" else self._copy_out(key, storage)
                moved.append(_Away(storage, storage.nbytes(), copy))
            _synchronize(self._device)
            for item in moved:
                freed += item.num_bytes
                item.storage.resize_(0)
            self._away[part] = moved
        return freed

    def reload(self, parts: Iterable[Part] = PARTS) -> int:
        """Move parts back, bit for bit. Returns their bytes."""
        back = 0
        for part in parts:
            for item in self._away.pop(part, []):
                item.storage.resize_(item.num_bytes)
                whole = _bytes_of(item.storage)
                if item.copy is None:
                    whole.zero_()
                else:
                    whole.copy_(item.copy, non_blocking=True)
                back += item.num_bytes
        _synchronize(self._device)
        return back

    def _copy_out(self, key: int, storage: torch.UntypedStorage) -> Tensor:
        kept = self._kept.get(key)
        if kept is None or kept.numel() != storage.nbytes():
            pinned = self._device.type == "cuda"
            kept = self._kept[key] = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pinned)
        kept.copy_(_bytes_of(storage), non_blocking=True)
        return kept

    def _storages(self, part: Part) -> Iterator[tuple[int, torch.UntypedStorage]]:
        """Every storage of a part once, with a key that stays the same."""
        owners = {"weights": self._weights, "gradients": self._gradients, "optimizer": self._states}
        seen: set[int] = set()
        for number, tensor in enumerate(owners[part]()):
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in seen and tensor.device == self._device:
                seen.add(storage.data_ptr())
                yield PARTS.index(part) << 48 | number, storage

    def _buffers(self) -> list[Any]:
        return [*self._ddp.buffers, *self._ddp.expert_parallel_buffers] if self._ddp is not None else []

    def _weights(self) -> Iterator[Tensor]:
        for buffer in self._buffers():
            if buffer.param_data is not None:
                yield buffer.param_data
        yield from (p.data for p in self._module.parameters())
        yield from self._module.buffers()

    def _gradients(self) -> Iterator[Tensor]:
        for buffer in self._buffers():
            yield buffer.grad_data

    def _states(self) -> Iterator[Tensor]:
        """fp32 copies of the weights and both moments, as torch, apex and Transformer Engine keep them."""
        weights = {t.untyped_storage().data_ptr() for t in self._weights()}
        if self._optimizer is None:
            return
        for optimizer in getattr(self._optimizer, "chained_optimizers", [self._optimizer]):
            inner = getattr(optimizer, "optimizer", optimizer)
            for group in inner.param_groups:
                for parameter in group["params"]:
                    if parameter.untyped_storage().data_ptr() not in weights:
                        yield parameter.data
                    for value in inner.state.get(parameter, {}).values():
                        if isinstance(value, Tensor) and value.dim():
                            yield value


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
