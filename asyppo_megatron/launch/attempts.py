"""How often a job has started a run, and whether that got it any further: `run_dir/attempts.json`.

A start counts against the run when it failed, or vanished with its node, and no newer checkpoint has appeared since it
began. A start that was asked to stop does not count. Another job begins anew: a person has looked.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from asyppo_megatron.launch.failure import RankFailed, Stopped
from asyppo_megatron.types import RunError

FILE = "attempts.json"
MAX_FAILURES = 3
EXIT_GIVEN_UP = 78  # of a launcher: starting the same again is no use (sysexits: configuration error)
_SHOWN = 300  # characters of a reason


class GivenUp(RunError):
    """The run has failed too often without getting on."""

    exit_code = EXIT_GIVEN_UP


@contextmanager
def attempt(run_dir: Path, job: str) -> Iterator[None]:
    """One start of a run by a job; how it ends is noted.

    Raises:
        GivenUp: earlier starts of this job, or now this one too, have failed three times without a new checkpoint.
    """
    starts = _read(run_dir, job)
    _refuse_if_hopeless(run_dir, starts, None)
    start = {"at": _now(), "checkpoint": _newest_checkpoint(run_dir), "ended": None}
    starts.append(start)
    _write(run_dir, job, starts)
    try:
        yield
    except Stopped as e:
        start["ended"] = f"stopped by {e}"
        _write(run_dir, job, starts)
        raise
    except (RankFailed, RunError) as e:
        start["ended"] = f"failed: {str(e)[:_SHOWN]}"
        _write(run_dir, job, starts)
        _refuse_if_hopeless(run_dir, starts, e)
        raise
    start["ended"] = "finished"
    _write(run_dir, job, starts)


def _refuse_if_hopeless(run_dir: Path, starts: list[dict[str, Any]], cause: Exception | None) -> None:
    newest = _newest_checkpoint(run_dir)
    failed = [s for s in starts if s["checkpoint"] == newest and not _is_harmless(s["ended"])]
    if len(failed) < MAX_FAILURES:
        return
    since = "without any checkpoint" if newest is None else f"without getting past the checkpoint of step {newest}"
    reasons = "; ".join(f"{s['at']}: {s['ended'] or 'vanished, with its node or by a kill'}" for s in failed)
    raise GivenUp(
        f"run {run_dir}: got {len(failed)} starts of this job that failed {since}; not started again. {reasons}. Look "
        f"at {run_dir / 'logs'}, mend the cause, then submit the job again"
    ) from cause


def _is_harmless(ended: str | None) -> bool:
    return ended is not None and not ended.startswith("failed")


def _newest_checkpoint(run_dir: Path) -> int | None:
    """Step of the newest complete checkpoint, by its name alone: this process must not import Megatron."""
    names = [path.name.removeprefix("step-") for path in run_dir.glob("checkpoints/step-*")]
    return max((int(name) for name in names if name.isdigit()), default=None)


def _read(run_dir: Path, job: str) -> list[dict[str, Any]]:
    try:
        found = json.loads((run_dir / FILE).read_text())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as e:
        raise ValueError(f"{run_dir / FILE}: is not readable ({e}); remove it to start counting anew") from e
    return list(found["starts"]) if found.get("job") == job else []


def _write(run_dir: Path, job: str, starts: list[dict[str, Any]]) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    part = run_dir / f".{FILE}.part"
    part.write_text(json.dumps({"job": job, "starts": starts}, indent=1))
    os.replace(part, run_dir / FILE)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
