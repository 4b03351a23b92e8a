"""A real Slurm of two nodes on this machine, and jobs on it that must end with everything they started."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from e2e_runs import ROOT, steps, tree

HERE = Path(__file__).resolve().parent
GPUS = 8  # a node, as the scripts ask for; null devices, so torch finds none and computes on the CPU
LIMIT_S = 420.0


def wait_until(condition: Callable[[], Any], what: Callable[[], str], limit_s: float = LIMIT_S) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_s:.0f} s: {what()}"
        time.sleep(0.05)


class Slurm:
    """The cluster; `directory` is short-lived and its own."""

    def __init__(self, directory: Path, data: Path):
        self.directory, self.data = directory, data
        self.conf = directory / "slurm.conf"
        self._local("start", "2", str(GPUS))

    def _local(self, command: str, *arguments: str) -> None:
        subprocess.run(
            [str(HERE / "local_slurm.sh"), command, str(self.directory), *arguments], check=True, timeout=120
        )

    def call(self, *command: str, **environment: str) -> str:
        """Output of one of Slurm's commands."""
        env = {**os.environ, "SLURM_CONF": str(self.conf), **environment}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(
        self,
        run_dir: Path,
        *overrides: str,
        script: str = "asyppo_14b",
        nodes: int = 2,
        limit_s: float = LIMIT_S,
    ) -> Job:
        """`sbatch` of one of our scripts with a tiny configuration."""
        config = run_dir.with_suffix(".yaml")
        config.write_text(yaml.safe_dump(tree(self.data, run_dir)))
        log = run_dir.with_suffix(".log")
        options = [f"--nodes={nodes}", f"--output={log}", "--time=60"]
        number = self.call(
            "sbatch",
            "--parsable",
            *options,
            f"slurm/{script}.sbatch",
            *overrides,
            ASYPPO_CONFIG=str(config),
            ASYPPO_PYTHON=sys.executable,
        ).strip()
        return Job(self, number, run_dir, log, limit_s)

    def kill_node(self, name: str) -> None:
        self._local("kill-node", name)

    def start_node(self, name: str) -> None:
        self._local("start-node", name)

    def close(self) -> None:
        self._local("stop")


class Job:
    """One job, over all its starts."""

    def __init__(self, slurm: Slurm, number: str, run_dir: Path, log: Path, limit_s: float = LIMIT_S):
        self._limit_s = limit_s
        self._slurm, self.number, self.run_dir, self._log = slurm, number, run_dir, log
        self._hastened = 0  # restarts that were brought forward

    @property
    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def show(self) -> dict[str, str]:
        """What `scontrol show job` knows."""
        words = self._slurm.call("scontrol", "show", "job", "-o", self.number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    @property
    def restarts(self) -> int:
        return int(self.show()["Restarts"])

    def signal(self, *arguments: str) -> None:
        self._slurm.call("scancel", *arguments, self.number)

    def limit(self, minutes: int) -> None:
        """Change its time limit, which counts from its last start."""
        self._slurm.call("scontrol", "update", f"JobId={self.number}", f"TimeLimit={minutes}")

    def requeue(self) -> None:
        self._slurm.call("scontrol", "requeue", self.number)

    def wait_for_step(self, step: int) -> None:
        def reached() -> bool:
            path = self.run_dir / "metrics.jsonl"
            return path.exists() and any(row["step"] >= step for row in steps(path))

        wait_until(reached, lambda: f"step {step}\n{self.log}")

    def wait_for_restart(self, count: int) -> None:
        """Until the job has been put back into the queue so often, and begins again without Slurm's two minutes."""
        wait_until(lambda: self.restarts >= count, lambda: f"start {count}\n{self.log}")
        self._begin_soon()

    def wait(self) -> str:
        """The final state, once nothing of the job is left on the machine."""

        def ended() -> bool:
            state = self.show()["JobState"]
            self._begin_soon()
            return state not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")

        wait_until(ended, lambda: f"the end\n{self.log}", self._limit_s)
        wait_until(lambda: not self.processes(), lambda: f"left behind: {self.processes()}", 30.0)
        return self.show()["JobState"]

    def _begin_soon(self) -> None:
        """Spare a job that was put back into the queue Slurm's two minutes (but not all: it revokes by the second)."""
        found = self.show()
        if found["JobState"] == "PENDING" and int(found["Restarts"]) > self._hastened:
            self._hastened = int(found["Restarts"])
            self._slurm.call("scontrol", "update", f"JobId={self.number}", "StartTime=now+4")

    def processes(self) -> list[psutil.Process]:
        """Everything that Slurm or we started for the job, zombies aside."""
        found = []
        for process in psutil.process_iter():
            try:
                env = process.environ()
                ours = env.get("SLURM_JOB_ID") == self.number and env.get("SLURM_CONF") == str(self._slurm.conf)
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def pid_of(self, rank: int) -> int:
        """The process of a rank: the oldest whose stderr is its log."""
        log = str(self.run_dir / "logs" / f"rank-{rank:05d}.log")
        pids = [p.pid for p in self.processes() if _stderr(p.pid) == log]
        if not pids:
            pytest.fail(f"no process of rank {rank}:\n{self.log}")
        return min(pids)


def _stderr(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/fd/2")
    except OSError:
        return ""
