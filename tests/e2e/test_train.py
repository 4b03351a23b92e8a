"""`asyppo train` from start to end: what a run leaves behind, in several placements and algorithms."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from e2e_runs import CHECKPOINTS, NUM_STEPS, Asyppo, Command, checkpoint, saved_steps, steps
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from asyppo_megatron.config import load_config
from asyppo_megatron.observability.metrics import read_metrics, read_series

METRICS = [
    "reward",
    "accuracy",
    "entropy",
    "clip_fraction",
    "approx_kl",
    "value_std",
    "masked_advantage_fraction",
    "masked_entropy_fraction",
    "explained_variance/critic_0",
    "explained_variance/critic_1",
    *(f"{name}/{role}" for name in ("loss", "grad_norm", "lr") for role in ("actor", "critic_0", "critic_1")),
    "prompt_length",
    "response_length",
    "truncation_rate",
    "kept_mass",
    "memory/peak_gb",
    *(
        f"seconds/{phase}"
        for phase in (
            "step",
            "other",
            "generation",
            "rollouts",
            "exchange",
            "targets",
            "metrics",
            "weight_sync",
            "checkpoint",
        )
    ),
    *(
        f"{what}/{phase}"
        for what in ("seconds", "tokens")
        for phase in ("actor_logprobs", "actor_update", "critic_update", "critic_values")
    ),
]
OUR_LINE = re.compile(r"\d{4}-\d\d-\d\d [\d:,]+ (INFO|WARNING) ")


def test_every_step_has_every_metric(finished: Command):
    rows = steps(finished.run_dir)
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    for row in rows:
        missing = [name for name in METRICS if not isinstance(row.get(name), int | float)]
        assert not [name for name in missing if name not in row.get("nonfinite", {})], row
        # With few responses a critic's share may have one reward only: then there is no variance to explain.
        assert all(name.startswith("explained_variance/") for name in missing)
    for name in METRICS:
        assert read_series(rows, name)[0], f"{name} is never a number"
    assert len({row["reward"] for row in rows}) > 1, "rewards that never differ teach and prove nothing"


def test_each_role_follows_its_own_schedule(finished: Command):
    rows = steps(finished.run_dir)
    critic_0 = [3e-3 * 1 / 2, 3e-3, *(1e-5 + (3e-3 - 1e-5) * (1 - i / 4) for i in range(4))]
    assert [row["lr/critic_0"] for row in rows] == pytest.approx(critic_0)
    # Two optimizer steps a step: warm-up over the first four.
    assert [row["lr/critic_1"] for row in rows] == pytest.approx([1e-3 * 3 / 8, 1e-3 * 7 / 8, *[1e-3] * 4])
    actor = [5e-3 * (i + 1) / 3 for i in range(3)]
    actor += [1e-5 + (5e-3 - 1e-5) * 0.5 * (1 + math.cos(math.pi * i / 9)) for i in range(9)]
    assert [row["lr/actor"] for row in rows] == pytest.approx(
        [(a + b) / 2 for a, b in zip(actor[::2], actor[1::2], strict=True)]
    )


def test_the_run_directory_is_complete(finished: Command, asyppo: Asyppo):
    run_dir = finished.run_dir
    assert load_config(run_dir / "config.yaml") == load_config(asyppo.config(run_dir))
    assert saved_steps(run_dir) == [NUM_STEPS - CHECKPOINTS, NUM_STEPS]
    assert not list((run_dir / "checkpoints").glob(".*"))
    state = json.loads((checkpoint(run_dir, NUM_STEPS) / "run.json").read_text())
    assert state["step"] == NUM_STEPS and state["roles"] == ["actor", "critic_0", "critic_1"]
    assert (run_dir / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in (run_dir / "logs").iterdir()} == {
        "driver.log",
        "launcher.log",
        *(f"rank-{r:05d}.log" for r in range(4)),
    }
    assert {p.name for p in (run_dir / "eval").iterdir()} == {"step-000000", "step-000003", "step-000006"}
    assert not list(run_dir.glob("wandb*")), "wandb is disabled unless asked for"


def test_the_terminal_shows_our_lines_only(finished: Command):
    lines = finished.err.splitlines()
    assert [line for line in lines if not OUR_LINE.match(line)] == []
    assert sum("reward" in line for line in lines) == NUM_STEPS
    assert finished.out == ""


def test_prompts_that_are_too_long_are_skipped_counted_and_reported(finished: Command, data: Path):
    rows = [json.loads(line) for line in (data / "rl_train.jsonl").open()]
    too_long = sum(len(row["problem"]) > 11 for row in rows)
    assert too_long
    expected = (
        f"WARNING data.train: skipped {too_long} of {len(rows)} prompts, longer than rollout.max_prompt_tokens 11"
    )
    assert expected in finished.err


@pytest.mark.parametrize(("role", "base"), [("actor", "actor"), ("critic_0", "critic"), ("critic_1", "critic")])
def test_the_exported_models_load_and_have_learned(finished: Command, data: Path, role, base):
    kind = AutoModelForCausalLM if role == "actor" else AutoModelForTokenClassification
    model, loading = kind.from_pretrained(finished.run_dir / "hf" / role, output_loading_info=True)
    assert not any(loading.values()), loading
    before = AutoModelForCausalLM.from_pretrained(data / base).model
    changed = [not torch.equal(a, b) for a, b in zip(model.model.parameters(), before.parameters(), strict=True)]
    assert all(changed)
    with torch.no_grad():
        assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_eval_of_the_exported_actor_equals_the_last_evaluation_of_training(finished: Command, asyppo: Asyppo, tmp_path):
    (last,) = [r for r in read_metrics(finished.run_dir) if r["step"] == NUM_STEPS and "eval/heldout/greedy" in r]
    model = finished.run_dir / "hf" / "actor"
    command = asyppo.start(tmp_path / "run", f"--model={model}", f"--out={tmp_path / 'out'}", command="eval")
    assert command.wait() == 0, command.err
    greedy, average = last["eval/heldout/greedy"], last["eval/heldout/avg@2"]
    assert f"heldout: greedy {greedy:.4f}, avg@2 {average:.4f} on " in command.out
    (rows,) = (tmp_path / "out").rglob("heldout.jsonl")
    assert rows.read_text() == (finished.run_dir / "eval" / "step-000006" / "heldout.jsonl").read_text()


def test_all_roles_share_one_rank_with_values_first_a_kl_loss_and_wandb_offline(asyppo: Asyppo, tmp_path):
    pytest.importorskip("wandb")
    no_network = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9")
    run = asyppo.train(
        tmp_path / "run",
        "actor.ranks=0",
        "actor.layout.tp=1",
        "critics.*.ranks=0",
        "critics.*.value_clip=0.2",
        "num_steps=2",
        "ppo.order=values_first",
        "ppo.kl.coef=0.1",
        "checkpoint.async_save=false",
        "eval.every=0",
        "logging.wandb=offline",
        **no_network,
    )
    rows = steps(run.run_dir)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["seconds/reference_logprobs"] > 0 for row in rows)
    assert saved_steps(run.run_dir) == [2]
    assert list(run.run_dir.glob("wandb/offline-run-*/*.wandb"))
    assert [line for line in run.err.splitlines() if not OUR_LINE.match(line)] == []


def test_grpo_runs_without_critics_on_two_data_parallel_ranks(asyppo: Asyppo, tmp_path):
    run = asyppo.train(
        tmp_path / "run",
        "critics=[]",
        "actor.layout.tp=1",
        "num_steps=2",
        "ppo.advantage=grpo",
        "ppo.advantage_mask_fraction=0",
        "ppo.entropy_mask_fraction=0",
        "eval.every=0",
    )
    rows = steps(run.run_dir)
    assert [row["step"] for row in rows] == [1, 2] and saved_steps(run.run_dir) == [2]
    assert not any("critic" in name for row in rows for name in row)
    assert {p.name for p in (run.run_dir / "hf").iterdir()} == {"actor"}
