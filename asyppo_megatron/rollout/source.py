"""Where a rank's batches come from: the driver's journal, announced through the run's store."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from asyppo_megatron.observability.board import Slot
from asyppo_megatron.parallel.exchange import broadcast_batch
from asyppo_megatron.rollout import journal
from asyppo_megatron.rollout.client import DriverHandle, RolloutError
from asyppo_megatron.types import PackedBatch

logger = logging.getLogger(__name__)
_POLL_S = 2.0
_READY, _STOP, _PUSH = b"ready", b"stop", b"push"  # what rank 0 tells the others
_MAX_PUSHES = 8  # of one version while a batch is waited for


class DriverSource:
    """One rank's view of the rollouts; only rank 0 talks to the driver.

    While rollouts are generated no rank waits inside a collective of the device: rank 0 asks the driver, the
    others sleep on a key of the store, each under its own deadline. What they do next is rank 0's word there.

    Args:
        handle: the driver on rank 0, None elsewhere.
        store: key-value store of the run.
        timeout_s: longest wait for one batch.
        slot: says whether the run is to stop.
        patience_s: longest that a batch may take from rank 0 to all others, for the board.
        max_staleness: updates that may lie between the weights of a token and the step that trains on it.
    """

    def __init__(
        self,
        handle: DriverHandle | None,
        run_dir: Path,
        store: dist.Store,
        device: torch.device,
        timeout_s: float,
        slot: Slot,
        patience_s: float,
        max_staleness: int = 0,
    ):
        self._slot, self._patience_s = slot, patience_s
        self._handle, self._run_dir, self._store = handle, run_dir, store
        self._device, self._timeout_s, self._max_staleness = device, timeout_s, max_staleness
        self.manifest: dict[str, Any] = {}  # of the last batch, on rank 0
        self._told: dict[int, list[str]] = {}  # keys of the last steps, on rank 0

    def restore(self, rollout_state: dict[str, Any]) -> None:
        if self._handle is not None:
            self._handle.client.restore(rollout_state)

    def load_weights(self, directory: Path, policy_version: int) -> None:
        """Have the engine take a complete version directory."""
        if self._handle is not None:
            self._handle.client.load_weights(directory, policy_version)

    def begin_update(self, policy_version: int) -> list[str]:
        """URLs of the engines, whose weights the ranks are about to change; on rank 0."""
        return self._handle.client.begin_update(policy_version) if self._handle is not None else []

    def end_update(self, policy_version: int, path: Path | None = None) -> None:
        """The engines have these weights; `path`: a directory that has them too."""
        if self._handle is not None:
            self._handle.client.end_update(policy_version, path)

    def start(self, step: int, policy_version: int) -> None:
        """Begin the rollouts of a step; returns at once."""
        if self._handle is not None:
            self._handle.client.start(step, policy_version)

    def next_batch(self, step: int, push: Callable[[], None]) -> PackedBatch | None:
        """The step's batch, on every rank. A collective of the world once the rollouts are there.

        Args:
            push: brings the weights of the last push once more, for engines that have lost them since: those that
                ended and came back. All ranks call it together, as often as rank 0 says.

        Returns:
            None, on every rank, where the run was asked to stop while the rollouts were generated.

        Raises:
            RolloutError: generation failed, the driver died, or the deadline passed.
        """
        deadline = time.monotonic() + self._timeout_s
        arrays, header = None, None
        for number in itertools.count():
            key = f"batch/{step}/{number}"
            if self._handle is None:
                self._store.wait([key], timedelta(seconds=self._timeout_s))
                word = self._store.get(key)
            else:
                word = self._decide(step, deadline, number)
                if word == _READY:
                    arrays, header = self._load(step)  # an error in it comes before the others wait in a collective
                self._tell(step, key, word)
            if word == _STOP:
                return None
            if word == _READY:
                break
            push()
        with self._slot.during("batch", self._patience_s):
            return broadcast_batch(arrays, header, self._device)

    def _decide(self, step: int, deadline: float, pushes: int) -> bytes:
        """What all ranks do next, on rank 0, which waits until there is something to do; `pushes` were done before."""
        assert self._handle is not None
        while not self._is_ready(step):
            if self._slot.stop_requested:
                return _STOP
            if time.monotonic() >= deadline:
                raise RolloutError(
                    f"rollouts of step {step}: got nothing for {self._timeout_s:.0f} s (rollout.timeout_s); see the "
                    "driver's log, raise the limit if generation is merely slow"
                )
            if self._handle.client.needs_weights:
                if pushes == _MAX_PUSHES:
                    raise RolloutError(
                        f"rollouts of step {step}: engines lost the current weights {pushes} times; see their logs"
                    )
                logger.warning("step %d: an engine came back without the current weights; pushing them again", step)
                return _PUSH
        return _READY

    def _load(self, step: int) -> tuple[dict[str, np.ndarray], tuple[int, ...]]:
        """Arrays and header of a journalled step, on rank 0, which keeps its manifest."""
        arrays, self.manifest = journal.load_step(self._run_dir, step)
        version = int(arrays["versions"].min()) if arrays["versions"].size else self.manifest["policy_version"]
        if self._max_staleness and step - version > self._max_staleness:
            raise RolloutError(
                f"rollouts of step {step}: got tokens of version {version}, need at least "
                f"{step - self._max_staleness} (rollout.max_staleness {self._max_staleness}); this is a fault of the "
                "program, nothing was trained on them"
            )
        return arrays, (step, version, arrays["tokens"].size, arrays["rewards"].size)

    def _tell(self, step: int, key: str, word: bytes) -> None:
        """Tell the other ranks, and forget what everyone has passed."""
        self._store.set(key, word)
        self._told.setdefault(step, []).append(key)
        for old in self._told.pop(step - 2, ()):
            self._store.delete_key(old)

    def _is_ready(self, step: int) -> bool:
        """Whether the step's rollouts are there, after a short wait."""
        assert self._handle is not None
        try:
            return self._handle.client.wait(step, _POLL_S)
        except RolloutError as e:
            if not self._slot.stop_requested:
                raise
            logger.warning("stopping; rollouts of step %d failed, perhaps by the same signal: %s", step, e)
            return False

    def evaluate(self, step: int) -> list[dict[str, Any]]:
        """Evaluation results of the weights that the engine holds; empty on ranks other than 0."""
        return self._handle.client.evaluate(step) if self._handle is not None else []

    def prune(self, before_step: int) -> None:
        """Drop journalled steps that no checkpoint can need any more."""
        if self._handle is not None:
            journal.prune(self._run_dir, before_step)

    def close(self) -> None:
        if self._handle is not None:
            self._handle.close()
