"""Runs through a real SGLang server: a few steps synchronous and asynchronous, interrupted, and short of room."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from engine_servers import EngineServer
from rollout_engines import run_config

from asyppo_megatron.config import dump_config
from asyppo_megatron.observability.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 600.0
BATCH = 12  # responses of a step


class Runs:
    """Training runs in processes of their own, ended with the test."""

    def __init__(self, server: EngineServer):
        self._server = server
        self._started: list[subprocess.Popen] = []

    def start(self, run_dir: Path, *overrides: str, url: str | None = None) -> subprocess.Popen:
        config = run_config(self._server.model, run_dir, [url or self._server.url])
        path = run_dir.with_suffix(".yaml")
        path.write_text(dump_config(config))
        command = [sys.executable, "-m", "asyppo_megatron", "train", str(path), *overrides]
        with (run_dir.parent / f"{run_dir.name}.err").open("wb") as err:
            process = subprocess.Popen(command, cwd=ROOT, stderr=err, start_new_session=True)
        self._started.append(process)
        return process

    def train(self, run_dir: Path, *overrides: str) -> list[dict]:
        """Metrics of a run that must succeed."""
        code = self.start(run_dir, *overrides).wait(LIMIT_S)
        assert code == 0, errors(run_dir)
        return [row for row in read_metrics(run_dir) if "reward" in row]

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


def errors(run_dir: Path) -> str:
    return (run_dir.parent / f"{run_dir.name}.err").read_text()


def manifests(run_dir: Path) -> list[dict]:
    return [json.loads(p.read_text()) for p in sorted((run_dir / "rollouts").glob("step-*/manifest.json"))]


def wait_until(condition, process: subprocess.Popen, run_dir: Path) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, errors(run_dir)
        time.sleep(0.05)


@pytest.fixture
def runs(engine_server: EngineServer) -> Iterator[Runs]:
    runs = Runs(engine_server)
    yield runs
    runs.close()
    engine_server.post("/continue_generation")
    engine_server.post("/update_weights_from_disk", model_path=str(engine_server.model), weight_version="default")


def test_a_synchronous_run_trains_on_what_its_own_weights_generated(runs: Runs, tmp_path):
    rows = runs.train(tmp_path / "run", "weight_sync.transport=disk")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["mismatch_max"] < 1e-3 and row["mismatch_ess"] > 0.999 for row in rows), (
        "the engine has stale weights"
    )
    assert all(row["rollout/reissued"] == 0 and row["rollout/engines"] == 1 for row in rows)


def test_an_asynchronous_run_interrupted_neither_loses_nor_repeats_a_prompt(runs: Runs, tmp_path):
    settings = ("weight_sync.transport=disk", "rollout.max_staleness=1", "num_steps=4")
    run_dir = tmp_path / "run"
    process = runs.start(run_dir, *settings)
    wait_until(lambda: len(list(run_dir.glob("checkpoints/step-*"))) >= 2, process, run_dir)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    rows = runs.train(run_dir, *settings)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["staleness/max"] <= 1 for row in rows)
    taken = manifests(run_dir)[:4]
    found = [problem for manifest in taken for problem in manifest["problems"]]
    assert len(set(found)) == len(found) == 12, "a prompt was repeated or lost"
    assert [m["rollout_state_after"]["consumed"] for m in taken] == [3, 6, 9, 12]
    assert all(m["statistics"]["reward_status"] == {"ok": BATCH} for m in taken)


def test_a_full_disk_stops_the_run_with_the_place_and_the_cause(runs: Runs, tmp_path):
    if os.geteuid() or not Path("/dev/full").exists():
        pytest.skip("mounting a small disk needs root")
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("this machine cannot mount a tmpfs")
    try:
        process = runs.start(tmp_path / "run", f"weight_sync.dir={small}", "weight_sync.transport=disk")
        assert process.wait(LIMIT_S) == 1
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)
    assert "No space left on device" in errors(tmp_path / "run") and str(small) in errors(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [0, 1])
def test_the_demo_through_sglang_reaches_the_bar(staleness, tmp_path):
    """`asyppo demo` with the servers that it starts itself."""
    from engine_servers import engine_environment

    config = yaml.safe_load((ROOT / "model_configs/runs/demo_sglang.yaml").read_text())
    assert config["num_steps"] == 40
    command = [sys.executable, "-m", "asyppo_megatron", "demo", "--config", "model_configs/runs/demo_sglang.yaml"]
    overrides = [f"run_dir={tmp_path / 'run'}", f"rollout.max_staleness={staleness}"]
    subprocess.run([*command, *overrides], cwd=ROOT, check=True, timeout=3600, env=engine_environment())
    rows = read_metrics(tmp_path / "run")
    greedy = [row["eval/heldout/greedy"] for row in rows if "eval/heldout/greedy" in row]
    assert greedy[-1] >= 0.9
    assert max((row.get("staleness/max", 0) for row in rows), default=0) == staleness
    shutil.rmtree(tmp_path / "run")
