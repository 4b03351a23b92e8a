"""A driver with two sources, several rewards and a curriculum: what reaches the journal, and an exact resume."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from driver_runs import Drivers, assert_equal, configure, copy_of, make_demo

from asyppo_megatron.config import Config
from asyppo_megatron.demo import task
from asyppo_megatron.rollout import journal

STEPS = 5


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return make_demo(tmp_path_factory.mktemp("demo"))


@pytest.fixture
def drivers():
    drivers = Drivers()
    yield drivers
    drivers.close()


def mixed(demo: Path) -> Config:
    """Two shares of the demo's problems; the second is also scored token by token, by a user's function."""
    rows = (demo / "rl_train.jsonl").read_text().splitlines()
    for name, part in (("even", rows[::2]), ("odd", rows[1::2])):
        (demo / f"{name}.jsonl").write_text("\n".join(part) + "\n")
    sources = [
        {"name": "even", "path": str(demo / "even.jsonl"), "weight": 2.0, "rewards": ["exact"]},
        {"name": "odd", "path": str(demo / "odd.jsonl"), "rewards": ["exact", "lengths"]},
    ]
    function = {"kind": "function", "function": "reward_functions:token_lengths", "workers": 1, "per": "token"}
    return configure(
        demo,
        data={"train": None, "sources": sources, "curriculum": {"enabled": True, "floor": 0.2, "memory": 8}},
        reward={"kind": "math"},  # the default, as if it were not there
        rewards=[
            {"kind": "exact", "answer_pattern": "([0-9])", "weight": 2.0},
            {"name": "lengths", "weight": 0.25, **function},
        ],
    )


def generate(handle, steps: range) -> None:
    for step in steps:
        handle.client.start(step, 0)
        assert handle.client.wait(step, 120)


def test_sources_rewards_and_curriculum_reach_the_journal_and_survive_a_resume(demo, drivers, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
    config = mixed(demo)
    whole = drivers.start(config, tmp_path / "whole")
    whole.client.load_weights(demo / "w0", 0)
    generate(whole, range(STEPS))
    steps = [journal.load_step(tmp_path / "whole", s) for s in range(STEPS)]

    manifest = steps[0][1]
    statistics = manifest["statistics"]
    assert {"reward/exact/mean", "reward/lengths/mean", "reward/dense", "source/even/accuracy"} <= statistics.keys()
    assert (statistics["source/even/prompts"], statistics["source/odd/prompts"]) == (2, 1)
    last = steps[-1][1]["statistics"]
    assert (last["source/even/prompts"], last["source/odd/prompts"]) == (10, 5)
    arrays = steps[0][0]
    groups = arrays["group_ids"]
    special = {task.VOCABULARY.index(task.END), task.VOCABULARY.index(task.UNKNOWN)}
    ids = {row["id"] for row in map(json.loads, (demo / "odd.jsonl").open())}
    dense = arrays["token_rewards"]
    assert dense.shape == arrays["tokens"].shape and not dense[~arrays["loss_mask"]].any()
    for i, (start, end) in enumerate(zip(arrays["cu_seqlens"][:-1], arrays["cu_seqlens"][1:], strict=True)):
        is_odd = manifest["problems"][groups[i]] in ids
        mask = arrays["loss_mask"][start:end]
        # One character a token, so every token that is no special one is worth 0.25.
        expected = (
            [0.25 * (t not in special) for t in arrays["tokens"][start:end][1:][mask[:-1]]]
            if is_odd
            else [0.0] * mask.sum()
        )
        np.testing.assert_array_equal(dense[start:end][mask], expected)
    assert set(np.unique(arrays["rewards"])) <= {0.0, 2.0}
    assert statistics["reward"] == pytest.approx(2 * statistics["reward/exact/mean"])

    # Another driver, from the state after step 1, generates the same steps 2, 3 and 4.
    state = steps[1][1]["rollout_state_after"]
    assert state["pass_rates"] != steps[0][1]["rollout_state_after"]["pass_rates"]
    again = drivers.start(config, tmp_path / "again")
    again.client.restore(json.loads(json.dumps(state)))
    again.client.load_weights(demo / "w0", 0)
    generate(again, range(2, STEPS))
    for step in range(2, STEPS):
        found, found_manifest = journal.load_step(tmp_path / "again", step)
        assert_equal(copy_of(found), copy_of(steps[step][0]))
        for key in ("problems", "rollout_state_after", "rollout_state_before", "settings"):
            assert found_manifest[key] == steps[step][1][key], key


def test_a_reward_that_cannot_work_is_told_at_the_start(demo, drivers, tmp_path):
    from asyppo_megatron.rollout.client import RolloutError

    config = configure(demo, reward={"kind": "function", "function": "no_such_module:f", "workers": 1})
    with pytest.raises(RolloutError, match="reward.function: got 'no_such_module:f', which cannot be used"):
        drivers.start(config, tmp_path).client.hello()
