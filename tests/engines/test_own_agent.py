"""`asyppo train` that names no engines: it starts them, loses them to nobody, and takes them up after a crash."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from agent_processes import assert_gone, end, wait_until
from engine_servers import ROOT, START_S, engine_environment
from safetensors.torch import load_file

from asyppo_megatron.observability.metrics import read_metrics
from asyppo_megatron.rollout.agents import AgentClient, AgentError, address_path, read_address

LIMIT_S = 1200.0  # for a start of the ranks and an engine on a busy machine


def write_run(model: Path, directory: Path) -> Path:
    problems = directory / "train.jsonl"
    rows = [{"id": f"p{i}", "problem": f"{i} plus {i} is", "answer": str(2 * i), "source": "sums"} for i in range(8)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "run_dir": str(directory / "run"),
        "num_steps": 40,
        "actor": {"model": str(model), "precision": "fp32"},
        "ppo": {"advantage": "grpo", "advantage_mask_fraction": 0, "entropy_mask_fraction": 0},
        "rollout": {
            "engine": "sglang",
            "prompts_per_step": 2,
            "responses_per_prompt": 4,
            "max_prompt_tokens": 32,
            "max_response_tokens": 16,
            "top_p": 1.0,
            "top_k": 0,
            "temperature": 1.0,
            "sglang": {"max_total_tokens": 8192, "max_concurrency": 16, "mem_fraction": 0.5},
        },
        "reward": {"kind": "exact", "answer_pattern": "([a-m])"},
        "data": {"train": str(problems), "tokenizer": str(model), "chat_template": "none"},
        "checkpoint": {"every": 1, "at_end": False, "export_hf": False},
    }
    path = directory / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def start_run(path: Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "asyppo_megatron", "train", str(path), *overrides]
    with (path.parent / "train.log").open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, env=engine_environment(), stdout=log, stderr=log)


def steps_done(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return max((int(row["step"]) for row in read_metrics(path) if "reward" in row), default=0) if path.exists() else 0


@pytest.mark.slow
def test_a_killed_run_takes_up_its_engines_at_the_next_start_and_ends_them_when_it_is_done(engine_model, tmp_path):
    path, run_dir = write_run(engine_model, tmp_path), tmp_path / "run"

    def alive_and_at_work(run: subprocess.Popen) -> int:
        assert run.poll() is None, (tmp_path / "train.log").read_text()[-4000:]
        return steps_done(run_dir)

    first = start_run(path)
    try:
        wait_until(lambda: alive_and_at_work(first), lambda steps: steps >= 2, LIMIT_S)
        agent = AgentClient(read_address(address_path(run_dir)).url)
        pid, before = agent.health()["pid"], agent.engines()
        first.kill()
        first.wait()
        done = steps_done(run_dir)

        second = start_run(path, f"num_steps={done + 2}")
        row: dict[str, Any] = wait_until(agent.engines, lambda rows: rows[0]["state"] == "ready", START_S)[0]
        assert row["incarnation"] == before[0]["incarnation"]
        assert row["restarts"] == 0
        assert second.wait(LIMIT_S) == 0, (tmp_path / "train.log").read_text()[-4000:]
        assert steps_done(run_dir) == done + 2
        assert_gone([pid, *before[0]["pids"]], agent.url, row["url"])
        assert not address_path(run_dir).exists()
    finally:
        end(first)
        with contextlib.suppress(AgentError):
            AgentClient(read_address(address_path(run_dir)).url).shutdown()


@pytest.mark.slow
def test_roles_that_leave_the_device_are_saved_and_exported_whole(engine_model, tmp_path):
    """Checkpoint, resume and export of a colocated run, whose weights are on the host while engines generate."""
    path, run_dir = write_run(engine_model, tmp_path), tmp_path / "run"
    colocated = ["actor.offload=all", "rollout.sglang.placement=colocated", "checkpoint.export_hf=true"]
    for steps in (2, 3):
        run = start_run(path, f"num_steps={steps}", *colocated)
        try:
            assert run.wait(LIMIT_S) == 0, (tmp_path / "train.log").read_text()[-4000:]
        finally:
            end(run)
    rows = [row for row in read_metrics(run_dir / "metrics.jsonl") if "reward" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    # The last step comes after the resume: what was saved scores as what the engine was given then.
    assert all(row["mismatch_max"] < 1e-4 for row in rows), rows
    before, after = (load_file(folder / "model.safetensors") for folder in (engine_model, run_dir / "hf" / "actor"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(torch.allclose(before[name], after[name], atol=0.01) for name in before)
