"""Interrupted runs: started again, they go on as if nothing had happened, and nothing of them is left behind.

"As if nothing had happened": on a CPU, in the same layout, the metrics of every later step are equal to the bit,
times and memory aside. Each role has a schedule of its own and saves lie two steps apart (`e2e_runs.tree`).
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_runs import NUM_STEPS, Asyppo, Command, saved_steps, stop, trajectory

from asyppo_megatron.backend.scratch import ScratchDirectory, remove_abandoned

PROCESSES = ["launcher", "rank-00000", "rank-00001", "rank-00003", "driver"]


def scratch_of(command: Command) -> list[Path]:
    """Socket and weight directories that a command's processes hold locked."""
    held = {f.path for p in command.processes() for f in p.open_files() if f.path.endswith("/.lock")}
    return [Path(path).parent for path in held]


def is_saving(run_dir: Path) -> bool:
    return any((run_dir / "checkpoints").glob(".step-*.part"))


def check_killed(command: Command, who: str, logs: Path) -> None:
    """What a run says about a process that was killed."""
    code, err = command.wait(), command.err
    last = err.splitlines()[-1]
    assert "Traceback" not in err
    if who == "launcher":
        assert code == -signal.SIGKILL
        return
    assert code == 1
    if who == "driver":
        assert last.startswith("error: rollout driver: died during ")
        assert last.endswith(f"see {logs / 'driver.log'}; logs of all ranks: {logs}")
    else:
        assert re.fullmatch(
            rf"error: rank {int(who[-5:])} \(process \d+\) was killed by SIGKILL, perhaps for lack of memory; "
            rf"logs of all ranks: {logs}",
            last,
        )


def test_a_run_goes_on_exactly_whatever_was_killed_and_whenever(finished: Command, asyppo: Asyppo, tmp_path):
    run_dir = tmp_path / "run"
    left: list[Path] = []

    def killed(who: str, when: Callable[[Command], None]) -> None:
        command = asyppo.start(run_dir)
        when(command)
        assert not any(path.exists() for path in left), "directories of the last start are still there"
        left[:] = scratch_of(command)
        stop(command, who)
        check_killed(command, who, run_dir / "logs")
        assert len(left) == 2, "a socket's and one of weights"

    killed("rank-00000", lambda c: c.wait_for_step(1))  # before the first checkpoint: from the beginning
    assert saved_steps(run_dir) == []
    killed("rank-00003", lambda c: c.wait_until(lambda: saved_steps(run_dir), "a checkpoint"))
    assert saved_steps(run_dir) == [2]
    killed("driver", lambda c: c.wait_for_step(3))
    killed("launcher", lambda c: (c.wait_for_step(4), c.wait_until(lambda: is_saving(run_dir), "a save")))
    assert is_saving(run_dir), "the save was over before the kill"
    assert saved_steps(run_dir) == [2]
    asyppo.train(run_dir)
    assert not any(path.exists() for path in left)
    assert saved_steps(run_dir) == [4, NUM_STEPS] and not is_saving(run_dir)
    assert trajectory(run_dir) == trajectory(finished.run_dir)
    for role in ("actor", "critic_0", "critic_1"):
        ours, theirs = (path / "hf" / role / "model.safetensors" for path in (run_dir, finished.run_dir))
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("saving", [False, True])
@pytest.mark.parametrize("who", PROCESSES)
def test_every_process_may_be_killed_between_and_during_saves(finished: Command, asyppo: Asyppo, tmp_path, who, saving):
    run_dir = tmp_path / "run"
    command = asyppo.start(run_dir)
    command.wait_for_step(3)
    if saving:
        command.wait_until(lambda: is_saving(run_dir), "a save")
    stop(command, who)
    check_killed(command, who, run_dir / "logs")
    asyppo.train(run_dir)
    assert trajectory(run_dir) == trajectory(finished.run_dir)


@pytest.mark.slow
def test_ctrl_c_stops_everything_at_once_and_the_run_can_go_on(finished, asyppo: Asyppo, tmp_path):
    command = asyppo.start(tmp_path / "run", "eval.every=0", "checkpoint.every=0")
    command.wait_for_step(2)
    stop(command, "launcher", signal.SIGINT)
    assert command.wait() == 128 + signal.SIGINT
    assert command.err.splitlines()[-1] == "stopped by SIGINT; start the same command again to resume"
    assert "Traceback" not in command.err and saved_steps(tmp_path / "run") == []


@pytest.mark.parametrize("sig", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_run_that_is_asked_to_stop_saves_first_and_goes_on_exactly(finished, asyppo: Asyppo, tmp_path, sig):
    for attempt in range(8):  # on a busy machine a run may be over, or in its last step, when it hears of the signal
        run_dir = tmp_path / f"run-{attempt}"
        command = asyppo.start(run_dir, "checkpoint.every=0")
        command.wait_for_step(1)
        for process in command.processes():  # as Slurm does it: to everything that belongs to the job
            process.send_signal(sig)
        code = command.wait()
        if code and saved_steps(run_dir) != [NUM_STEPS]:
            break
    assert code == 75
    assert command.err.splitlines()[-1] == (
        f"stopped by {sig.name} after a checkpoint; start the same command again to resume"
    )
    (step,) = saved_steps(run_dir)
    assert 1 <= step < NUM_STEPS and "Traceback" not in command.err
    asyppo.train(run_dir, "checkpoint.every=0")
    assert saved_steps(run_dir) == [step, NUM_STEPS]
    assert trajectory(run_dir) == trajectory(finished.run_dir)


@pytest.mark.slow  # it waits for most of the collectives' timeout
def test_a_rank_that_hangs_ends_the_run_by_name_with_the_stacks_of_the_others(finished, asyppo: Asyppo, tmp_path):
    run_dir = tmp_path / "run"
    command = asyppo.start(run_dir, "checkpoint.every=1", "collective_timeout_s=40")
    command.wait_for_step(2)
    stop(command, "rank-00001", signal.SIGSTOP)
    assert command.wait() == 1
    assert re.fullmatch(
        r"error: step [2-6]: no progress for \d+ s; rank 1 \(actor; process \d+\) is stopped by a signal in \w+; "
        r"waiting for it: rank 0 in .*; stacks of the ranks that answer \(0, 2, 3\) are in their logs; logs of .*",
        command.err.splitlines()[-1],
    ), command.err
    for rank in (0, 2, 3):
        assert "most recent call first" in (run_dir / "logs" / f"rank-{rank:05d}.log").read_text()
    asyppo.train(run_dir, "checkpoint.every=1")
    assert trajectory(run_dir) == trajectory(finished.run_dir)


def test_abandoned_directories_are_removed_and_those_in_use_are_not(tmp_path):
    mine, foreign = ScratchDirectory(tmp_path, "weights"), tmp_path / "asyppo-other"
    foreign.mkdir()  # no lock in it: not one of ours
    abandoned = tmp_path / "asyppo-weights-abc"
    abandoned.mkdir()
    (abandoned / ".lock").touch()
    (abandoned / "model.safetensors").write_bytes(b"x")
    assert remove_abandoned(tmp_path) == [abandoned]
    assert mine.path.is_dir() and foreign.is_dir() and not abandoned.exists()
    mine.close()
    mine.close()
    assert not mine.path.exists()
