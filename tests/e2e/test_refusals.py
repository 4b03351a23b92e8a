"""Wrong input ends a command with exit code 1 and a message, before anything is written or any process started.

`Asyppo.refuse` checks all of that; here are the messages. What lies behind them has its unit tests.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from e2e_runs import NUM_STEPS, Asyppo, Command, checkpoint, saved_steps

from asyppo_megatron.observability.metrics import read_metrics


@pytest.mark.parametrize(
    ("overrides", "errors"),
    [
        (["rollout.promts_per_step=4"], ["rollout.promts_per_step: unknown key; did you mean 'prompts_per_step'?"]),
        (
            ["actor.ranks=0-2", "critics.*.ranks=3"],
            [
                "actor.layout: got tp 2 x pp 1 x cp 1 = 2 on 3 ranks, need a divisor of 3; change the layout or "
                "actor.ranks"
            ],
        ),
        (
            ["actor.ranks=0-3", "actor.layout.tp=4"],
            [
                "actor.layout.tp: got 4, need a divisor of the model's num_heads 2; lower tp",
                "actor.layout.tp: got 4, need a divisor of the model's num_kv_heads 2; lower tp",
            ],
        ),
        (
            ["critics.0.ranks=1-2"],
            [
                "ranks: got actor on [0, 1] and critic_0 on [1, 2], which overlap in part; give them the same ranks, "
                "one inside the other, or disjoint ones"
            ],
        ),
        (
            ["rollout.responses_per_prompt=3", "actor.mini_batch_size=12"],
            [
                "rollout.responses_per_prompt: got 3, not divisible by 2 critics; choose a multiple of 2 or set "
                "ppo.share_remainder to rotate or drop"
            ],
        ),
        (
            ["ppo.entropy_mask_fraction=0", "critics=[{model: m, ranks: 2}]"],
            [
                "ppo: got masks (advantage 0.2, entropy 0.0) with 1 critic(s), need >= 2 to disagree; add a critic "
                "or set both fractions to 0"
            ],
        ),
        (
            ["actor.model=/nowhere", "data.train=/none.jsonl", "data.tokenizer=/nowhere", "reward.answer_pattern='('"],
            [
                "actor.model: /nowhere/config.json: got No such file or directory, need a readable file; point at a "
                "Hugging Face model directory",
                "data.train: /none.jsonl does not exist",
                "reward.answer_pattern: got '(', which is no regular expression: missing ) at position 1",
                "data.tokenizer: /nowhere has no tokenizer.json or tokenizer_config.json",
            ],
        ),
        (["num_steps"], ["override: got 'num_steps', need key=value"]),
    ],
)
def test_a_wrong_configuration_is_refused_with_all_its_errors(asyppo: Asyppo, tmp_path, overrides, errors):
    message = asyppo.refuse(tmp_path / "run", *overrides)
    assert message.splitlines() == [f"configuration: {len(errors)} error(s)", *(f"  - {e}" for e in errors)]


def test_dataset_rows_without_an_answer_are_named_by_line(asyppo: Asyppo, data: Path, tmp_path):
    rows = [json.loads(line) for line in (data / "rl_train.jsonl").open()]
    del rows[2]["answer"]
    rows[4]["answer"] = ""
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = asyppo.refuse(tmp_path / "run", f"data.train={path}")
    assert message.splitlines() == [
        "configuration: 2 error(s)",
        f"  - data.train: {path}:3: answer: missing",
        f"  - data.train: {path}:5: answer: got '', need a non-empty string",
    ]


def test_a_loss_that_is_nan_stops_the_run_and_leaves_the_last_checkpoint(finished: Command, asyppo: Asyppo, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished.run_dir, run_dir)
    command = asyppo.start(run_dir, f"num_steps={NUM_STEPS + 4}", "critics.1.optimizer.lr=1e30", "eval.every=0")
    assert command.wait() == 1
    assert command.err.splitlines()[-1] == (
        f"error: step {NUM_STEPS + 1}: a loss, gradient, logprob or value is NaN or infinite in critic_1 on rank 3; "
        "stopped before these weights were saved or used, the last checkpoint is intact. Lower the learning rate of "
        f"the role, or look at the step's rollouts; logs of all ranks: {run_dir / 'logs'}"
    )
    assert "Traceback" not in command.err
    assert max(row["step"] for row in read_metrics(run_dir)) == NUM_STEPS
    assert saved_steps(run_dir) == saved_steps(finished.run_dir)
    for path in checkpoint(finished.run_dir, NUM_STEPS).iterdir():
        assert (checkpoint(run_dir, NUM_STEPS) / path.name).read_bytes() == path.read_bytes()
