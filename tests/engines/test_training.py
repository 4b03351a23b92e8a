"""Runs through a real SGLang server: a few steps synchronous and asynchronous, interrupted, and short of room."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from engine_runs import LIMIT_S, Runs, manifests, said, wait_while_running
from engine_servers import ROOT, EngineServer, engine_environment

from asyppo_megatron.observability.metrics import read_metrics

BATCH = 12  # responses of a step


@pytest.fixture
def runs(engine_server: EngineServer) -> Iterator[Runs]:
    runs = Runs(engine_server.model, engine_server.url)
    yield runs
    runs.close()
    engine_server.post("/continue_generation")
    engine_server.post("/update_weights_from_disk", model_path=str(engine_server.model), weight_version="default")


@pytest.mark.parametrize("transport", ["collective", pytest.param("disk", marks=pytest.mark.slow)])
def test_a_synchronous_run_trains_on_what_its_own_weights_generated(
    runs: Runs, engine_server: EngineServer, tmp_path, transport
):
    actor = ("actor.ranks=0-1", "actor.layout.tp=2", "actor.optimizer.lr=1e-3")
    rows = runs.train(tmp_path / "run", f"weight_sync.transport={transport}", "weight_sync.checksum=full", *actor)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert engine_server.get("/model_info")["weight_version"] == "3"
    # Ranks and engine score the same tokens with the same weights, after an update too.
    assert all(row["mismatch_max"] < 1e-4 and row["mismatch_ess"] > 0.999 for row in rows), rows
    assert all(row["rollout/reissued"] == 0 and row["rollout/engines"] == 1 for row in rows)


def test_an_asynchronous_run_interrupted_neither_loses_nor_repeats_a_prompt(runs: Runs, tmp_path):
    settings = ("weight_sync.transport=disk", "rollout.max_staleness=1", "num_steps=4")
    run_dir = tmp_path / "run"
    process = runs.start(run_dir, *settings)
    wait_while_running(process, run_dir, lambda: len(list(run_dir.glob("checkpoints/step-*"))) >= 2)
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
    assert "No space left on device" in said(tmp_path / "run") and str(small) in said(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [0, 1])
def test_the_demo_through_sglang_reaches_the_bar(staleness, tmp_path):
    """`asyppo demo` with the servers that it starts itself."""
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
