"""Runs that generate with real engines: their configuration, and `asyppo train` in processes that end with the test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
from engine_servers import ROOT, engine_environment, run_config

from asyppo_megatron.config import dump_config
from asyppo_megatron.observability.metrics import Row, read_metrics

LIMIT_S = 1200.0  # for a start of the ranks and an engine on a busy machine


def write_run(model: Path, run_dir: Path, urls: Sequence[str] = (), **sglang: Any) -> Path:
    """The configuration file of a run, beside its directory, and the problems it trains on."""
    config = run_config(model, run_dir, urls, sglang=sglang)
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"id": f"p{i}", "problem": chr(97 + i % 26) * (i % 5 + 1), "answer": "x"} for i in range(40)]
    config.data.train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = run_dir.with_suffix(".yaml")
    path.write_text(dump_config(config))
    return path


class Runs:
    """Training runs in sessions of their own, ended with the test; the agent of a run has another and may outlive it.

    Args:
        model: of every role.
        urls: of the engines; none: the run starts its own.
    """

    def __init__(self, model: Path, *urls: str):
        self._model, self._urls = model, urls
        self._started: list[subprocess.Popen] = []

    def start(self, run_dir: Path, *overrides: str) -> subprocess.Popen:
        path = write_run(self._model, run_dir, self._urls)
        command = [sys.executable, "-m", "asyppo_megatron", "train", str(path), *overrides]
        with _log(run_dir).open("ab") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=engine_environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self._started.append(process)
        return process

    def train(self, run_dir: Path, *overrides: str) -> list[Row]:
        """Metrics of the steps of a run that must succeed."""
        code = self.start(run_dir, *overrides).wait(LIMIT_S)
        assert code == 0, said(run_dir)
        return steps(run_dir)

    def close(self) -> None:
        for process in self._started:
            for p in psutil.process_iter(["pid"]):
                if p.pid == process.pid or _session(p.pid) == process.pid:
                    p.kill()
            process.wait()


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return -1


def _log(run_dir: Path) -> Path:
    return run_dir.with_suffix(".log")


def said(run_dir: Path) -> str:
    """The end of what all starts of a run printed."""
    return _log(run_dir).read_text()[-8000:]


def steps(run_dir: Path) -> list[Row]:
    """Rows of the training steps so far."""
    return [row for row in read_metrics(run_dir) if "reward" in row] if (run_dir / "metrics.jsonl").exists() else []


def manifests(run_dir: Path) -> list[dict[str, Any]]:
    """What the journal says of each batch."""
    return [json.loads(p.read_text()) for p in sorted((run_dir / "rollouts").glob("step-*/manifest.json"))]


def wait_while_running(process: subprocess.Popen, run_dir: Path, condition: Callable[[], bool]) -> None:
    """Until the condition holds; fails when the run ends first."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, said(run_dir)
        time.sleep(0.05)
