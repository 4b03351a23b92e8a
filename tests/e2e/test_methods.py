"""The methods as a user meets them: one key, value pre-training as a command, and a resume in the middle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from e2e_runs import LIMIT_S, Asyppo, saved_steps, steps
from safetensors.torch import load_file

from asyppo_megatron.config import load_config


def weights(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


def test_one_key_makes_the_run_grpo_with_a_world_of_the_actor_alone(asyppo: Asyppo, tmp_path: Path):
    run = asyppo.train(tmp_path / "run", "method=grpo", "num_steps=2", "eval.every=0")
    assert "method grpo: 0 of the 2 critics listed take part" in run.err
    assert sorted(p.name for p in (run.run_dir / "logs").glob("rank-*")) == ["rank-00000.log", "rank-00001.log"]
    rows = steps(run.run_dir)
    assert [row["step"] for row in rows] == [1, 2] and saved_steps(run.run_dir) == [2]
    assert not any("critic" in name for row in rows for name in row)
    assert {p.name for p in (run.run_dir / "hf").iterdir()} == {"actor"}
    resolved = load_config(run.run_dir / "config.yaml")
    assert resolved.method == "grpo" and resolved.critics == () and resolved.ppo.entropy_coef == 0


def test_critics_are_pretrained_on_an_unchanged_policy_and_a_run_starts_from_them(asyppo: Asyppo, tmp_path: Path):
    command = asyppo.start(tmp_path / "run", "--steps", "2", command="pretrain-critics")
    assert command.wait(LIMIT_S) == 0, command.err
    directory = tmp_path / "run" / "pretrain-critics"
    assert {p.name for p in (directory / "hf").iterdir()} == {"critic_0", "critic_1"}
    assert f"critics.1.model={directory / 'hf' / 'critic_1'}" in command.out
    for row in steps(directory):
        assert row["updates/actor"] == 0 and row["updates/critic_0"] == 1 and row["updates/critic_1"] == 2
        assert "seconds/actor_update" not in row and "seconds/actor_logprobs" not in row
    trained = weights(directory / "hf" / "critic_0")
    assert any(not torch.equal(trained[name], tensor) for name, tensor in weights(asyppo.data / "critic").items()
               if name in trained)  # fmt: skip
    run = asyppo.train(
        tmp_path / "run",
        f"critics.0.model={directory / 'hf' / 'critic_0'}",
        f"critics.1.model={directory / 'hf' / 'critic_1'}",
        "critics.*.optimizer.lr=1.0e-30",
        "critics.*.optimizer.min_lr=0",
        "num_steps=1",
        "eval.every=0",
    )
    started = weights(run.run_dir / "hf" / "critic_0")
    assert started.keys() == trained.keys()
    for name, tensor in trained.items():  # the value head included
        torch.testing.assert_close(started[name], tensor, rtol=0, atol=1e-7)


def test_critics_learn_alone_in_the_warm_up_and_the_policy_at_every_second_step_after_it(
    asyppo: Asyppo, tmp_path: Path
):
    run = asyppo.train(
        tmp_path / "run", "num_steps=5", "ppo.critic_warmup_steps=1", "ppo.policy_every=2", "eval.every=0"
    )
    rows = steps(run.run_dir)
    assert [row["updates/actor"] for row in rows] == [0, 0, 2, 0, 2]
    assert all(row["updates/critic_0"] == 1 for row in rows)


@pytest.mark.slow  # three runs; the driver's part of it is in tests/unit/test_filtering.py
def test_what_was_dropped_and_skipped_is_counted_on_after_a_resume(asyppo: Asyppo, tmp_path: Path):
    options = ["method=dapo", "eval.every=0", "rollout.responses_per_prompt=2", "actor.mini_batch_size=4"]
    whole = asyppo.train(tmp_path / "whole", *options, "num_steps=4")
    asyppo.train(tmp_path / "part", *options, "num_steps=2")
    part = asyppo.train(tmp_path / "part", *options, "num_steps=4")
    assert "resumed from the checkpoint after step 2" in (part.run_dir / "logs" / "rank-00000.log").read_text()
    names = ("filter/dropped_groups", "filter/drawn_groups", "filter/dropped_groups_total", "filter/filled_groups",
             "reward", "skipped_prompts", "overlong_penalty", "response_length")  # fmt: skip
    rows = [steps(run.run_dir) for run in (whole, part)]
    for expected, found in zip(*rows, strict=True):
        assert {name: found[name] for name in names} == {name: expected[name] for name in names}
    assert rows[0][-1]["filter/dropped_groups_total"] > rows[0][1]["filter/dropped_groups_total"] > 0
    assert rows[0][-1]["skipped_prompts"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 4])
def test_asyppo_runs_with_one_and_with_four_critics(asyppo: Asyppo, tmp_path: Path, count: int):
    critics = ", ".join(f"{{model: {asyppo.data / 'critic'}, ranks: {2 + m}, precision: fp32}}" for m in range(4))
    masks = ["ppo.advantage_mask_fraction=0", "ppo.entropy_mask_fraction=0"] if count == 1 else []
    run = asyppo.train(
        tmp_path / "run", f"critics=[{critics}]", f"critics_used={count}", "num_steps=2", "eval.every=0", *masks
    )
    for row in steps(run.run_dir):
        assert [f"loss/critic_{m}" in row for m in range(5)] == [m < count for m in range(5)]
    assert len(list((run.run_dir / "logs").glob("rank-*"))) == 2 + count
