"""What each rank is doing right now, in memory that its launcher shares: read when a rank does not get on.

A rank writes a few dozen bytes whenever it enters or leaves a phase (some microseconds) and never waits. In the other
direction there are two flags: that the run is to stop, and that ranks are to say which collective they wait in.
"""

from __future__ import annotations

import json
import mmap
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_FLAGS, _SLOT = 8, 1024  # bytes: flags of the board, then the slots
_STOP, _QUESTION = 0, 1  # places of the flags
_WHERE = struct.Struct("<qdd32s32s")  # step, entered at (s, monotonic), deadline (s), phase, role
_ANSWERED = _WHERE.size  # place of the number of the question that the text answers
_TEXT = _ANSWERED + 1
_POLL_S = 0.5
_WORLD = {"default_pg": "world", "undefined": "unnamed"}  # what torch calls groups


@dataclass(frozen=True)
class Status:
    """One rank's slot.

    Attributes:
        step: number of the training step under way, counted from 1; 0 before the first.
        phase: name of `PhaseTimer`'s phase, or "between phases", "start", "end".
        role: whose work the phase is; empty for what all ranks do together.
        seconds: since the rank entered this phase.
        deadline_s: longest that this phase may take; 0: any time.
        has_answered: to the last question what it waits for.
        waits_in: collective that it waits in, as torch's flight recorder tells; empty where that is unknown.
    """

    step: int
    phase: str
    role: str
    seconds: float
    deadline_s: float
    has_answered: bool
    waits_in: str

    @property
    def is_late(self) -> bool:
        return 0 < self.deadline_s < self.seconds


class StatusBoard:
    """Slots of the ranks that one launcher starts. Made before they are forked.

    Args:
        num_slots: ranks of this launcher.
    """

    def __init__(self, num_slots: int):
        self._memory = mmap.mmap(-1, _FLAGS + num_slots * _SLOT)
        self.num_slots = num_slots
        for index in range(num_slots):
            self.slot(index).enter("start", "", 0.0)

    def slot(self, index: int) -> Slot:
        return Slot(self._memory, index)

    def request_stop(self) -> None:
        """Ask every rank to stop where it can be continued."""
        self._memory[_STOP] = 1

    def ask(self) -> None:
        """Ask every rank which collective it waits in; answers arrive within about a second."""
        self._memory[_QUESTION] = self._memory[_QUESTION] % 255 + 1

    def read(self, index: int) -> Status:
        slot = memoryview(self._memory)[_FLAGS + index * _SLOT :][:_SLOT]
        step, entered, deadline, phase, role = _WHERE.unpack_from(slot)
        asked = self._memory[_QUESTION]
        has_answered = asked > 0 and slot[_ANSWERED] == asked
        waits_in = _text(bytes(slot[_TEXT:])) if has_answered else ""
        return Status(step, _text(phase), _text(role), time.monotonic() - entered, deadline, has_answered, waits_in)


class Slot:
    """A rank's own part of a board."""

    def __init__(self, memory: mmap.mmap, index: int):
        self._memory, self._offset = memory, _FLAGS + index * _SLOT
        self._step = 0
        self._now: tuple[str, str, float] = ("start", "", 0.0)

    @property
    def stop_requested(self) -> bool:
        return self._memory[_STOP] != 0

    @property
    def question(self) -> int:
        """Number of the last question."""
        return self._memory[_QUESTION]

    def request_stop(self) -> None:
        """What the launcher would do: for a rank that torchrun started, and a signal reached."""
        self._memory[_STOP] = 1

    def begin_step(self, step: int) -> None:
        self._step = step

    def enter(self, phase: str, role: str, deadline_s: float) -> tuple[str, str, float]:
        """Note a phase; returns the one before it, to be entered again afterwards."""
        before, self._now = self._now, (phase, role, deadline_s)
        now = time.monotonic()
        _WHERE.pack_into(
            self._memory, self._offset, self._step, now, deadline_s, phase.encode()[:32], role.encode()[:32]
        )
        return before

    @contextmanager
    def during(self, phase: str, deadline_s: float, role: str = "") -> Iterator[None]:
        """Note a phase for the length of a block; not after an error: the board shall show where it was."""
        before = self.enter(phase, role, deadline_s)
        yield
        self.enter(*before)

    def answer(self, question: int, waits_in: str) -> None:
        """Say which collective this rank waits in."""
        room = _SLOT - _TEXT
        start = self._offset + _TEXT
        self._memory[start : start + room] = waits_in.encode()[:room].ljust(room, b"\0")
        self._memory[self._offset + _ANSWERED] = question


def answer_questions(slot: Slot, find: Callable[[], str]) -> threading.Thread:
    """Start a thread that answers the launcher's questions, also while the rank waits in a collective.

    Args:
        find: says which collective that is.
    """

    def run() -> None:
        answered = slot.question
        while True:
            time.sleep(_POLL_S)
            if slot.question != answered:
                answered = slot.question
                slot.answer(answered, find())

    thread = threading.Thread(target=run, name="answers", daemon=True)
    thread.start()
    return thread


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode(errors="replace")


def pending_collective(trace: bytes) -> str:
    """The oldest collective of torch's flight recorder (JSON) that has not ended: operation, group, number, sizes.

    The format is that of torch 2.11 to 2.14, version 2.10.
    """
    found = json.loads(trace)
    for entry in found.get("entries", []):
        if entry.get("retired") or entry.get("state") == "completed":
            continue
        name, described = entry["process_group"]
        group = _WORLD.get(described, described or name)
        return f"{entry['profiling_name']} number {entry['collective_seq_id']} of group {group} {entry['input_sizes']}"
    return ""
