"""`asyppo train` with two sources, two weighted rewards, one of them dense: what is logged, and the targets."""

from __future__ import annotations

import json

import numpy as np
import pytest
from e2e_runs import ROOT, Asyppo, Command, steps

from asyppo_megatron.config import load_config
from asyppo_megatron.demo import task
from asyppo_megatron.rollout import journal

NUM_STEPS = 3
GAMMA = 0.9
FUNCTIONS = ROOT / "tests" / "unit"  # where reward_functions.py lies


@pytest.fixture(scope="module")
def mixed(asyppo: Asyppo, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Two thirds of the prompts are scored by their answer, one third by a function of every token beside it."""
    directory = tmp_path_factory.mktemp("mixed")
    rows = (asyppo.data / "rl_train.jsonl").read_text().splitlines()
    for name, part in (("plain", rows[::2]), ("dense", rows[1::2])):
        (directory / f"{name}.jsonl").write_text("\n".join(part) + "\n")
    plain = {"name": "plain", "path": str(directory / "plain.jsonl"), "weight": 2, "rewards": ["exact"]}
    dense = {"name": "dense", "path": str(directory / "dense.jsonl"), "rewards": ["exact", "tokens"]}
    function = {"kind": "function", "function": "reward_functions:token_lengths", "per": "token", "workers": 1}
    rewards = [
        {"kind": "exact", "answer_pattern": "([0-9])", "weight": 3.0},
        {"name": "tokens", "weight": -0.125, **function},
    ]
    return asyppo.train(
        directory / "run",
        f"num_steps={NUM_STEPS}",
        f"ppo.gamma={GAMMA}",
        "reward={kind: math}",
        f"rewards={json.dumps(rewards)}",
        "data.train=null",
        f"data.sources={json.dumps([plain, dense])}",
        "data.curriculum.enabled=true",
        "rollout.prompts_per_step=6",
        "eval.every=3",
        "checkpoint.every=0",  # a checkpoint would prune the journal
        PYTHONPATH=f"{ROOT}:{FUNCTIONS}",
    )


def test_rewards_and_sources_are_logged_apart(mixed: Command):
    rows = steps(mixed.run_dir)
    assert [row["step"] for row in rows] == [1, 2, 3]
    for number, row in enumerate(rows, start=1):
        assert (row["source/plain/responses"], row["source/dense/responses"]) == (16, 8)
        assert (row["source/plain/prompts"], row["source/dense/prompts"]) == (4 * number, 2 * number)
        assert row["reward/exact/count"] == 24 and row["reward/tokens/count"] == 8
        assert row["reward"] == pytest.approx(3.0 * row["reward/exact/mean"])
        assert row["accuracy"] == pytest.approx(row["reward/exact/mean"])
        assert row["reward/dense"] == pytest.approx(-0.125 * row["reward/tokens/mean"]) and row["reward/dense"] < 0


def test_the_targets_are_those_of_the_journals_rewards(mixed: Command):
    """Mean return of a step, from the journal's tokens alone, in float64 loops; the function's values by hand."""
    special = {task.VOCABULARY.index(task.END), task.VOCABULARY.index(task.UNKNOWN)}
    sources = {
        row["id"]: name
        for name in ("plain", "dense")
        for row in map(json.loads, (mixed.run_dir.parent / f"{name}.jsonl").open())
    }
    for step, row in enumerate(steps(mixed.run_dir)):
        arrays, manifest = journal.load_step(mixed.run_dir, step)
        returns = []
        starts, ends = arrays["cu_seqlens"][:-1], arrays["cu_seqlens"][1:]
        for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
            is_dense = sources[manifest["problems"][arrays["group_ids"][i]]] == "dense"
            mask = arrays["loss_mask"][start:end][:-1]
            actions = arrays["tokens"][start:end][1:][mask].tolist()
            rewards = [-0.125 * (t not in special) if is_dense else 0.0 for t in actions]
            rewards[-1] += float(arrays["rewards"][i])
            for j in range(len(rewards)):
                returns.append(sum(GAMMA**n * r for n, r in enumerate(rewards[j:])))
        assert row["return_mean"] == pytest.approx(np.mean(returns), rel=1e-5, abs=1e-6)


def test_the_resolved_configuration_is_read_back(mixed: Command):
    config = load_config(mixed.run_dir / "config.yaml")
    assert [r.label for r in config.all_rewards] == ["exact", "tokens"]
    assert [s.name for s in config.data.all_sources] == ["plain", "dense"]
