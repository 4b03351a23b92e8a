"""Why a run ended: the one failure that explains the others, over all nodes."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from asyppo_megatron.launch.processes import EXIT_STOPPED, Child


class RankFailed(RuntimeError):
    """A rank ended before its work was done.

    Attributes:
        traceback: of the rank that failed first; empty where its message says enough.
    """

    def __init__(self, message: str, traceback: str = ""):
        super().__init__(message)
        self.traceback = traceback


class Stopped(KeyboardInterrupt):
    """A signal asked the launcher to stop.

    Attributes:
        is_saved: whether the ranks ended by themselves, with a checkpoint of their last step.
    """

    def __init__(self, signum: int, *, is_saved: bool = False):
        super().__init__(signal.Signals(signum).name)
        self.signum, self.is_saved = signum, is_saved


@dataclass(frozen=True)
class Failure:
    """One way of saying why.

    Attributes:
        weight: 0 explains the others (a killed or a stuck rank), 1 an error, 2 an exit code without a word.
        at: seconds of the wall clock.
    """

    weight: int
    at: float
    message: str
    traceback: str = ""


def find_failure(children: Sequence[Child], at: float) -> Failure | None:
    """What the ended ranks of one node have to say; None where none has failed.

    A killed rank, or the error that was reported first: the ranks that lost it as a peer fail too, later, and say
    nothing of interest.
    """
    failed = [child for child in children if child.code not in (None, 0, EXIT_STOPPED)]
    if not failed:
        return None
    for child in children:  # one that has reported may not have ended yet
        child.read_report()
    for child in failed:
        assert child.code is not None
        if child.code < 0:
            name = signal.Signals(-child.code).name
            hint = ", perhaps for lack of memory" if name == "SIGKILL" else ""
            return Failure(0, at, f"rank {child.rank} (process {child.pid}) was killed by {name}{hint}")
    reports = [(child.report.at, child.rank, child.report) for child in children if child.report is not None]
    if reports:
        _, _, report = min(reports, key=lambda r: r[:2])
        return Failure(1, report.at, report.message, report.traceback)
    child = failed[0]
    return Failure(2, at, f"rank {child.rank} (process {child.pid}) ended with exit code {child.code}")


def explain(failures: Sequence[Failure]) -> Failure:
    """The one that explains the others."""
    return min(failures, key=lambda f: (f.weight, f.at))
