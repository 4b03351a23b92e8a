"""`asyppo train` with an SGLang server: its ranks bring the weights, its driver generates with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from engine_servers import ROOT, EngineServer

from asyppo_megatron.observability.metrics import read_metrics

LIMIT_S = 300.0


def config(model: Path, server: EngineServer, directory: Path, transport: str) -> Path:
    problems = directory / "train.jsonl"
    rows = [{"id": f"p{i}", "problem": f"{i} plus {i} is", "answer": str(2 * i), "source": "sums"} for i in range(8)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "run_dir": str(directory / "run"),
        "num_steps": 2,
        "actor": {"model": str(model), "ranks": "0-1", "precision": "fp32", "layout": {"tp": 2}}
        | {"optimizer": {"lr": 1e-3}},
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
            "sglang": {"urls": [server.url]},
        },
        "reward": {"kind": "exact", "answer_pattern": "([a-m])"},
        "data": {"train": str(problems), "tokenizer": str(model), "chat_template": "none"},
        "checkpoint": {"every": 0, "at_end": False, "export_hf": False},
        "weight_sync": {"transport": transport, "checksum": "full"},
    }
    path = directory / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize("transport", ["collective", pytest.param("disk", marks=pytest.mark.slow)])
def test_a_run_trains_on_what_its_engine_generates(
    transport: str, engine_server: EngineServer, engine_model: Path, tmp_path: Path
) -> None:
    path = config(engine_model, engine_server, tmp_path, transport)
    done = subprocess.run(
        [sys.executable, "-m", "asyppo_megatron", "train", str(path)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=LIMIT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "reward" in row]
    assert [row["step"] for row in rows] == [1, 2]
    assert engine_server.get("/model_info")["weight_version"] == "2"
    # Ranks and engine score the same tokens with the same weights, after an update too.
    assert all(row["mismatch_max"] < 1e-4 for row in rows), rows
    engine_server.post("/update_weights_from_disk", model_path=str(engine_model), weight_version="default")
