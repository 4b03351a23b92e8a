"""Asynchronous runs: the same loop with batches that run ahead, and what an interruption may not change."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from e2e_runs import NUM_STEPS, Asyppo, Command, saved_steps, steps, stop

GROUPS, SAMPLES = 4, 4
ASYNC = ("rollout.max_staleness=2", "eval.every=0", "checkpoint.keep=10")  # keeps the journal of the whole run


def manifests(run_dir: Path) -> list[dict]:
    """Of all journalled steps."""
    paths = sorted((run_dir / "rollouts").glob("step-*/manifest.json"))
    return [json.loads(path.read_text()) for path in paths]


def prompts(run_dir: Path) -> list[list[str]]:
    """Problems of every step that was trained on."""
    return [m["problems"] for m in manifests(run_dir)][:NUM_STEPS]


@pytest.fixture(scope="module")
def ahead(asyppo: Asyppo, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """An asynchronous run without interruption."""
    return asyppo.train(tmp_path_factory.mktemp("ahead") / "run", *ASYNC)


def test_nothing_staler_than_the_bound_is_trained_on(ahead: Command):
    rows = steps(ahead.run_dir)
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    assert all(0 <= row["staleness/mean"] <= row["staleness/max"] <= 2 for row in rows)
    assert max(row["staleness/max"] for row in rows) > 0, "nothing ran ahead"
    assert all(np.isfinite(row["loss/actor"]) for row in rows)
    for step, manifest in enumerate(manifests(ahead.run_dir)):
        versions = np.load(ahead.run_dir / "rollouts" / f"step-{step:06d}" / "versions.npy")
        assert len(versions) == GROUPS * SAMPLES and versions.min() == manifest["policy_version"] >= step - 2


def test_the_mismatch_of_stale_rollouts_shows_where_weights_have_moved(ahead: Command, finished: Command):
    stale, fresh = (steps(command.run_dir) for command in (ahead, finished))
    assert all(row["mismatch_mean"] < 1e-5 for row in fresh)
    moved = [row["mismatch_mean"] for row in stale if row["staleness/mean"] > 0]
    assert moved and max(moved) > 1e-4, "old logprobs are those of the weights that sampled"


def interrupt(
    asyppo: Asyppo, run_dir: Path, step: int, who: str, sig: signal.Signals = signal.SIGKILL, *, saved: bool = False
) -> None:
    """Start a run and end one of its processes after a step, and where `saved` after a complete checkpoint."""
    command = asyppo.start(run_dir, *ASYNC)
    command.wait_for_step(step)
    if saved:
        command.wait_until(lambda: saved_steps(run_dir), "a checkpoint")
    stop(command, who, sig)
    assert command.wait() != 0


def check_complete(asyppo: Asyppo, run_dir: Path, whole: Path) -> None:
    """The run, started once more, has every step once and the prompts of one that was never interrupted."""
    asyppo.train(run_dir, *ASYNC)
    rows = steps(run_dir)
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    assert prompts(run_dir) == prompts(whole)
    assert all(row["staleness/max"] <= 2 for row in rows)


def test_an_interrupted_run_neither_loses_nor_repeats_a_prompt(ahead: Command, asyppo: Asyppo, tmp_path):
    run_dir = tmp_path / "run"
    interrupt(asyppo, run_dir, 1, "driver")  # before the first checkpoint
    interrupt(asyppo, run_dir, 3, "rank-00000", saved=True)
    check_complete(asyppo, run_dir, ahead.run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 4])
@pytest.mark.parametrize(
    ("who", "sig"), [("driver", signal.SIGKILL), ("rank-00003", signal.SIGKILL), ("launcher", signal.SIGTERM)]
)
def test_whatever_is_killed_and_whenever(ahead: Command, asyppo: Asyppo, tmp_path, who, sig, step):
    interrupt(asyppo, tmp_path / "run", step, who, sig)
    check_complete(asyppo, tmp_path / "run", ahead.run_dir)


def test_a_limit_on_the_mismatch_stops_the_run_before_the_weights_are_used(asyppo: Asyppo, tmp_path):
    command = asyppo.start(tmp_path / "run", *ASYNC, "rollout.max_mismatch=1e-4")
    assert command.wait() == 1
    assert "engines and trainer disagree by" in command.err and "rollout.max_mismatch 0.0001" in command.err
    assert "Traceback" not in command.err
    assert not any((command.run_dir / "hf").glob("*"))
