"""A job that generates with SGLang starts the node agents as a step of its own, where ranks leave nodes over."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from e2e_runs import ROOT, steps
from slurm_jobs import Slurm
from transformers import Qwen3ForCausalLM

from asyppo_megatron.demo import prepare

STAND_IN = ROOT / "tests" / "engines" / "stand_in"  # SGLang's kernels for a CPU


@pytest.mark.slow
@pytest.mark.sglang
def test_ranks_on_one_node_train_on_what_engines_of_another_generate(slurm: Slurm, tmp_path: Path, monkeypatch):
    torch.manual_seed(0)
    Qwen3ForCausalLM(prepare.critic_config()).save_pretrained(tmp_path / "model")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(STAND_IN), os.environ.get("PYTHONPATH", "")]))
    job = slurm.submit(
        tmp_path / "run",
        f"actor.model={tmp_path / 'model'}",
        f"critics.*.model={tmp_path / 'model'}",
        "actor.layout.tp=1",
        "num_steps=2",
        "eval.every=0",
        "checkpoint.export_hf=false",
        "rollout.engine=sglang",
        "rollout.sglang={max_total_tokens: 8192, max_concurrency: 16, mem_fraction: 0.5}",
        limit_s=1800.0,
    )
    assert job.wait() == "COMPLETED", job.log
    assert "4 ranks on node[1-2], 4 a node, engine sglang" in job.log
    assert "agent: http://node2:" in job.log
    rows = steps(job.run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["rollout/engines"] == 1 for row in rows)
