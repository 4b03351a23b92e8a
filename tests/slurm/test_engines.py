"""A job that generates with SGLang starts node agents as a step of their own: beside the actor, or on free nodes."""

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
@pytest.mark.parametrize(("placement", "ranks", "node", "other"), [("separate", 4, 2, 1), ("colocated", 2, 1, 2)])
def test_ranks_train_on_what_engines_of_the_right_node_generate(
    slurm: Slurm, tmp_path: Path, monkeypatch, placement: str, ranks: int, node: int, other: int
):
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
        f"rollout.sglang={{placement: {placement}, max_total_tokens: 8192, max_concurrency: 16, mem_fraction: 0.5}}",
        limit_s=1800.0,
    )
    assert job.wait() == "COMPLETED", job.log
    assert f"4 ranks on node[1-2], {ranks} a node, engine sglang" in job.log
    assert f"agent: http://node{node}:" in job.log and f"agent: http://node{other}:" not in job.log
    rows = steps(job.run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["rollout/engines"] == 1 for row in rows)
