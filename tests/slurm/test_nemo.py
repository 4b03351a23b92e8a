"""`asyppo launch`: the same recipes through NeMo-Run end as `asyppo train` does."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from e2e_runs import ROOT, Asyppo, Command, trajectory
from slurm_jobs import Job, Slurm

needs_nemo = pytest.mark.skipif(
    importlib.util.find_spec("nemo_run") is None, reason="NeMo-Run not installed (pip install 'asyppo_megatron[nemo]')"
)


def launch(config: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "asyppo_megatron", "launch", str(config), *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture
def config(local: Asyppo, tmp_path: Path) -> Path:
    return local.config(tmp_path / "run")


@pytest.mark.skipif(importlib.util.find_spec("nemo_run") is not None, reason="NeMo-Run is installed")
def test_without_the_extra_launch_says_what_to_install(config: Path):
    done = launch(config, "--executor", "local", "--dry-run")
    assert done.returncode == 1 and "pip install 'asyppo_megatron[nemo]'" in done.stderr
    assert "Traceback" not in done.stderr


@needs_nemo
def test_a_dry_run_shows_the_batch_script_and_starts_nothing(config: Path, tmp_path):
    options = ["--nodes", "2", "--gpus-per-node", "8", "--account", "a", "--partition", "p"]
    done = launch(config, "--executor", "slurm", *options, "--dry-run", "--job-dir", str(tmp_path / "jobs"))
    assert done.returncode == 0, done.stderr
    text = " ".join((done.stdout + done.stderr).split())
    for line in (
        "--nodes=2",
        "--gpus-per-node=8",
        "--account=a",
        "--partition=p",
        "--signal=USR1@300",
        "scontrol requeue",
    ):
        assert line in text
    assert not (tmp_path / "run").exists()


@needs_nemo
def test_what_does_not_fit_is_refused_before_an_experiment_is_made(config: Path, tmp_path):
    done = launch(config, "--executor", "slurm", "--nodes", "3", "--job-dir", str(tmp_path / "jobs"))
    assert done.returncode == 1 and "nodes: got 3 for 4 ranks" in done.stderr
    assert not (tmp_path / "jobs").exists()


@needs_nemo
def test_engines_that_nobody_would_start_are_refused(config: Path, tmp_path):
    options = ["--executor", "slurm", "--nodes", "2", "--job-dir", str(tmp_path / "jobs")]
    done = launch(config, "rollout.engine=sglang", "actor.layout.tp=1", *options)
    assert done.returncode == 1 and "got engines for nodes 1 of 2, need agents that run already" in done.stderr


@needs_nemo
@pytest.mark.slow
def test_the_local_executor_ends_as_train_does(reference: Command, config: Path, tmp_path):
    done = launch(config, "--executor", "local", "--job-dir", str(tmp_path / "jobs"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert trajectory(tmp_path / "run") == trajectory(reference.run_dir)


@needs_nemo
@pytest.mark.slow
def test_the_slurm_executor_ends_as_train_does(reference: Command, config: Path, slurm: Slurm, tmp_path):
    environment = {"SLURM_CONF": str(slurm.conf)}
    options = ["--nodes", "2", "--gpus-per-node", "8", "--job-dir", str(tmp_path / "jobs")]
    done = launch(config, "--executor", "slurm", *options, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (number,) = slurm.call("squeue", "--noheader", "--format=%i").split()
    job = Job(slurm, number, tmp_path / "run", tmp_path / "none.log")
    assert job.wait() == "COMPLETED"
    assert trajectory(tmp_path / "run") == trajectory(reference.run_dir)
