"""Jobs on a real Slurm of two nodes: whatever ends one, it goes on by itself and ends as if nothing had happened.

On a CPU, in the same layout, the metrics of every step are those of `asyppo train` to the bit, times and memory aside.
Every test waits until no process of its job is left. Between them they submit every script of slurm/.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time

import pytest
from e2e_runs import NUM_STEPS, Asyppo, Command, saved_steps, steps, trajectory
from slurm_jobs import Slurm


def test_a_job_on_two_nodes_equals_a_run_without_slurm(reference: Command, slurm: Slurm, tmp_path):
    job = slurm.submit(tmp_path / "run", "logging.level=DEBUG")
    assert job.wait() == "COMPLETED", job.log
    assert "4 ranks on node[1-2], 2 a node, engine embedded" in job.log
    assert {p.name for p in (job.run_dir / "logs").iterdir()} >= {"launcher.log", "launcher-00001.log"}
    assert trajectory(job.run_dir) == trajectory(reference.run_dir)


def test_a_job_whose_rank_is_killed_goes_on_by_itself(reference: Command, slurm: Slurm, tmp_path):
    job = slurm.submit(tmp_path / "run")
    job.wait_for_step(3)
    pid = job.pid_of(3)  # on the second node: the first must hear of it and say so
    os.kill(pid, signal.SIGKILL)
    job.wait_for_restart(1)
    said = f"error: rank 3 (process {pid}) was killed by SIGKILL, perhaps for lack of memory; logs of all ranks: "
    assert job.log.count(said) == 2, job.log  # each launcher once
    assert job.wait() == "COMPLETED", job.log
    assert trajectory(job.run_dir) == trajectory(reference.run_dir)


def test_an_allocation_that_does_not_fit_is_refused_before_anything_starts(slurm: Slurm, tmp_path):
    job = slurm.submit(tmp_path / "run", "critics.1.ranks=2", "actor.model=/nowhere")
    assert job.wait() == "FAILED"
    assert "nodes: got 2 for 3 ranks, need a divisor of 3" in job.log and "actor.model: /nowhere" in job.log
    assert job.restarts == 0 and not job.run_dir.exists()


@pytest.mark.slow
@pytest.mark.parametrize("sig", ["TERM", "USR1"])
def test_a_signal_to_all_processes_of_a_job_saves_and_requeues(reference: Command, slurm: Slurm, tmp_path, sig):
    job = slurm.submit(tmp_path / "run", "checkpoint.every=0")
    job.wait_for_step(2)
    job.signal(f"--signal={sig}")
    job.wait_for_restart(1)
    assert f"stopped by SIG{sig} after a checkpoint" in job.log
    assert saved_steps(job.run_dir), "nothing was saved"
    assert job.wait() == "COMPLETED", job.log
    assert trajectory(job.run_dir) == trajectory(reference.run_dir)


@pytest.mark.slow
def test_the_signal_before_the_time_limit_reaches_the_script_alone_and_requeues(reference, slurm: Slurm, tmp_path):
    job = slurm.submit(tmp_path / "run", "checkpoint.every=0", script="asyppo_4b")
    job.wait_for_step(2)
    job.signal("--batch", "--signal=USR1")  # what --signal=B:USR1@300 does
    job.wait_for_restart(1)
    assert "asked to stop" in job.log and "stopped by SIGUSR1 after a checkpoint" in job.log
    assert job.wait() == "COMPLETED", job.log
    assert trajectory(job.run_dir) == trajectory(reference.run_dir)


@pytest.mark.slow
def test_stacks_of_all_ranks_can_be_asked_for_and_the_job_runs_on(slurm: Slurm, tmp_path):
    job = slurm.submit(tmp_path / "run", "reward.kind=math", "reward.workers=2", "eval.every=0", "num_steps=60")
    job.wait_for_step(2)
    slurm.call("scancel", "--signal=USR2", f"{job.number}.1")  # a process that does not expect it would end
    assert job.wait() == "COMPLETED", job.log
    assert job.restarts == 0
    for name in ("rank-00000", "rank-00001", "rank-00002", "rank-00003"):
        assert "most recent call first" in (job.run_dir / "logs" / f"{name}.log").read_text(), name
    rows = steps(job.run_dir / "metrics.jsonl")
    assert len(rows) == 60 and not any(row.get("reward_status/verifier_error") for row in rows), rows


def test_doctor_compares_the_clocks_of_an_allocation(slurm: Slurm, tmp_path):
    found = slurm.call("salloc", "--nodes=2", sys.executable, "-m", "asyppo_megatron", "doctor", "--dir", str(tmp_path))
    assert re.search(r"^ok +clocks +2 nodes within 0\.\d s$", found, re.MULTILINE), found


@pytest.mark.slow
def test_requeue_from_outside_goes_on_from_the_last_checkpoint(reference: Command, slurm: Slurm, tmp_path):
    job = slurm.submit(tmp_path / "run", script="asyppo_8b")
    job.wait_for_step(3)
    job.requeue()
    job.wait_for_restart(1)
    assert job.wait() == "COMPLETED", job.log
    assert trajectory(job.run_dir) == trajectory(reference.run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("node", ["node2", "node1"])
def test_a_node_that_dies_requeues_the_job(reference: Command, slurm: Slurm, tmp_path, node):
    job = slurm.submit(tmp_path / "run")
    job.wait_for_step(3)
    slurm.kill_node(node)
    try:
        job.wait_for_restart(1)
    finally:
        slurm.start_node(node)
    assert job.wait() == "COMPLETED", job.log
    assert trajectory(job.run_dir) == trajectory(reference.run_dir)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "role"), [(0, "actor"), (1, "actor"), (2, "critic_0"), (3, "critic_1")])
def test_a_rank_that_hangs_is_named_and_the_job_goes_on(reference: Command, slurm: Slurm, tmp_path, rank, role):
    job = slurm.submit(tmp_path / "run", "collective_timeout_s=40")
    job.wait_for_step(3)
    pid = job.pid_of(rank)
    os.kill(pid, signal.SIGSTOP)
    job.wait_for_restart(1)
    assert f"; rank {rank} ({role}; process {pid}) is stopped by a signal in " in job.log
    assert "no progress for" in job.log and "waiting for it: rank" in job.log
    # Before rank 0 has begun the next step, the others wait for its word and not in a collective.
    assert "of group" in job.log or (rank == 0 and "waiting for it: rank 1 in rollouts" in job.log)
    for other in {0, 1, 2, 3} - {rank}:
        assert "most recent call first" in (job.run_dir / "logs" / f"rank-{other:05d}.log").read_text()
    assert job.wait() == "COMPLETED", job.log
    assert trajectory(job.run_dir) == trajectory(reference.run_dir)


@pytest.mark.slow
def test_a_job_that_hits_its_time_limit_has_saved_and_goes_on(local: Asyppo, slurm: Slurm, tmp_path):
    endless = ("num_steps=100000", "eval.every=0", "checkpoint.every=0", "checkpoint.grace_s=20")
    job = slurm.submit(tmp_path / "run", *endless)
    job.wait_for_step(2)
    job.limit(minutes=5)  # less is left of it than the signal wants: it comes within half a minute
    job.wait_for_restart(1)
    job.limit(minutes=60)
    (saved,) = saved_steps(job.run_dir)
    wanted = saved + 3
    job.wait_for_step(wanted)
    job.signal()
    assert job.wait() == "CANCELLED" and job.restarts == 1, "a cancelled job stays cancelled"
    other = local.start(tmp_path / "other", *endless)
    other.wait_for_step(wanted)
    other.end()
    rows = [[row for row in trajectory(path) if row["step"] <= wanted] for path in (job.run_dir, tmp_path / "other")]
    assert rows[0] == rows[1] and len(rows[0]) == wanted


@pytest.mark.slow
def test_a_run_that_fails_three_times_without_progress_stops_and_says_why(slurm: Slurm, tmp_path):
    job = slurm.submit(tmp_path / "run", "critics.1.optimizer.lr=1e30", "checkpoint.every=0", script="ppo_14b")
    assert job.wait() == "FAILED"
    assert job.restarts == 2
    assert "got 3 starts of this job that failed without any checkpoint; not started again" in job.log
    assert job.log.count("is NaN or infinite in critic_1 on rank 3") >= 3
    starts = json.loads((job.run_dir / "attempts.json").read_text())["starts"]
    assert [start["ended"].split(":")[0] for start in starts] == ["failed"] * 3


@pytest.mark.slow
def test_a_cancelled_job_ends_within_its_grace_and_is_not_requeued(slurm: Slurm, tmp_path):
    job = slurm.submit(tmp_path / "run", f"num_steps={100 * NUM_STEPS}", "eval.every=0", script="grpo_14b")
    job.wait_for_step(2)
    began = time.monotonic()
    job.signal()
    assert job.wait() == "CANCELLED" and job.restarts == 0
    assert time.monotonic() - began < 120
