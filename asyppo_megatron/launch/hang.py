"""A rank that does not get on: who it is, what the others wait for, and everyone's stack in the logs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asyppo_megatron.launch.failure import Failure
from asyppo_megatron.launch.peers import Peers
from asyppo_megatron.launch.processes import Child
from asyppo_megatron.observability.board import StatusBoard

_ANSWER_S = 5.0
_SHOWN = 8  # ranks that a message names; the logs have all
_STATES = {"T": "is stopped by a signal", "t": "is held by a debugger", "D": "is stuck in the kernel", "Z": "has died"}


@dataclass(frozen=True)
class Watch:
    """What a launcher needs to watch its ranks.

    Attributes:
        board: that they write to.
        roles: members of each role, by name.
        grace_s: seconds that a step under way is given after a stop signal.
        patience_s: longest that a rank may be stopped by a signal, whatever it does.
    """

    board: StatusBoard
    roles: Mapping[str, Sequence[int]]
    grace_s: float
    patience_s: float


class HangDetector:
    """Looks whether a rank stays in one phase for too long, and finds out why."""

    def __init__(self, watch: Watch, children: Sequence[Child], peers: Peers):
        self._watch, self._children, self._peers = watch, children, peers
        self._stopped_since: dict[int, float] = {}  # by process

    def poll(self) -> Failure | None:
        """A failure that names who is behind, or None while all get on."""
        running = [(index, child) for index, child in enumerate(self._children) if child.code is None]
        late = any(self._watch.board.read(index).is_late for index, _ in running)
        if not late and not self._is_one_stopped([c for _, c in running]) and not self._peers.hears_hang():
            return None
        self._peers.announce_hang()
        findings = self._peers.gather_findings(self._find(), 2 * _ANSWER_S)
        return Failure(0, time.time(), describe(findings, self._watch.roles))

    def _is_one_stopped(self, running: Sequence[Child]) -> bool:
        """Whether a signal has stopped a rank for too long; a phase that waits for rollouts may itself take hours."""
        now = time.monotonic()
        stopped = [child.pid for child in running if _process_state(child.pid) == "T"]
        self._stopped_since = {pid: self._stopped_since.get(pid, now) for pid in stopped}
        return any(now - since > self._watch.patience_s for since in self._stopped_since.values())

    def _find(self) -> list[dict[str, Any]]:
        """What the ranks of this node say about themselves; their stacks go to their logs."""
        board = self._watch.board
        running = [(index, child) for index, child in enumerate(self._children) if child.code is None]
        board.ask()
        for _, child in running:
            child.show_stacks()
        deadline = time.monotonic() + _ANSWER_S
        while time.monotonic() < deadline and not all(
            board.read(index).has_answered or _process_state(child.pid) in _STATES for index, child in running
        ):
            time.sleep(0.1)
        found = []
        for index, child in running:
            status = board.read(index)
            found.append(
                {
                    "rank": child.rank,
                    "pid": child.pid,
                    "state": _process_state(child.pid),
                    "step": status.step,
                    "phase": status.phase,
                    "role": status.role,
                    "seconds": status.seconds,
                    "answers": status.has_answered,
                    "waits_in": status.waits_in,
                }
            )
        return found


def describe(findings: Sequence[Mapping[str, Any]], roles: Mapping[str, Sequence[int]]) -> str:
    """Step, role, ranks and group in one message.

    Behind is who is stopped; else who does not answer; else who waits in no collective; else who entered its phase
    first, among those of the oldest step.
    """
    step = min(f["step"] for f in findings)
    behind = (
        [f for f in findings if f["state"] in _STATES]
        or [f for f in findings if not f["answers"]]
        or [f for f in findings if not f["waits_in"] and f["step"] == step and f["phase"] != "rollouts"]
    )
    if not behind:
        oldest = max(f["seconds"] for f in findings if f["step"] == step)
        behind = [f for f in findings if f["step"] == step and f["seconds"] > oldest - 1.0]
    waiting = [f for f in findings if f not in behind]
    seconds = max(f["seconds"] for f in findings)
    text = f"step {step}: no progress for {seconds:.0f} s; " + _listed([_who(f, roles) for f in behind])
    if waiting:
        text += "; waiting for it: " + _listed([_waits(f) for f in waiting])
    answering = ", ".join(str(f["rank"]) for f in findings if f["answers"]) or "none"
    return f"{text}; stacks of the ranks that answer ({answering}) are in their logs"


def _who(finding: Mapping[str, Any], roles: Mapping[str, Sequence[int]]) -> str:
    rank = finding["rank"]
    role = finding["role"] or ", ".join(name for name, ranks in roles.items() if rank in ranks)
    state = _STATES.get(finding["state"], "is behind" if finding["answers"] else "does not answer")
    return f"rank {rank} ({role}; process {finding['pid']}) {state} in {finding['phase']}"


def _waits(finding: Mapping[str, Any]) -> str:
    role = f" of {finding['role']}" if finding["role"] else ""
    where = f" for {finding['waits_in']}" if finding["waits_in"] else ""
    return f"rank {finding['rank']} in {finding['phase']}{role}{where}"


def _listed(items: Sequence[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more


def _process_state(pid: int) -> str:
    """Letter of the kernel for a process's state; Z for one that is not there."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"
