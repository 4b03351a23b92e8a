"""`asyppo train` that names no engines: it starts them, loses them to nobody, and takes them up after a crash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from agent_processes import assert_gone, wait_until
from engine_runs import LIMIT_S, Runs, manifests, said, steps, wait_while_running
from engine_servers import START_S
from safetensors.torch import load_file

from asyppo_megatron.rollout.agents import AgentClient, address_path, read_address

pytestmark = pytest.mark.slow
COLOCATED = ("actor.offload=all", "critics.*.offload=all", "rollout.sglang.placement=colocated")


def test_a_killed_run_takes_up_its_engines_at_the_next_start_and_ends_them_when_it_is_done(own_runs: Runs, tmp_path):
    run_dir = tmp_path / "run"
    first = own_runs.start(run_dir, "num_steps=40")
    wait_while_running(first, run_dir, lambda: len(steps(run_dir)) >= 2)
    agent = AgentClient(read_address(address_path(run_dir)).url)
    pid, before = agent.health()["pid"], agent.engines()
    first.kill()
    first.wait()
    done = len(steps(run_dir))

    second = own_runs.start(run_dir, f"num_steps={done + 2}")
    row: dict[str, Any] = wait_until(agent.engines, lambda rows: rows[0]["state"] == "ready", START_S)[0]
    assert row["incarnation"] == before[0]["incarnation"]
    assert row["restarts"] == 0
    assert second.wait(LIMIT_S) == 0, said(run_dir)
    assert len(steps(run_dir)) == done + 2
    assert_gone([pid, *before[0]["pids"]], agent.url, row["url"])
    assert not address_path(run_dir).exists()


def test_roles_that_leave_the_device_are_saved_and_exported_whole(own_runs: Runs, engine_model: Path, tmp_path):
    """Checkpoint, resume and export of a colocated run, whose weights are on the host while engines generate."""
    run_dir = tmp_path / "run"
    for count in (2, 3):
        rows = own_runs.train(run_dir, f"num_steps={count}", "checkpoint.export_hf=true", *COLOCATED)
    assert [row["step"] for row in rows] == [1, 2, 3]
    # The last step comes after the resume: what was saved scores as what the engine was given then.
    assert all(row["mismatch_max"] < 1e-4 for row in rows), rows
    before, after = (load_file(folder / "model.safetensors") for folder in (engine_model, run_dir / "hf" / "actor"))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(torch.allclose(before[name], after[name], atol=0.01) for name in before)


@pytest.mark.parametrize("on_update", ["carry", "requeue"])
def test_a_colocated_run_carries_over_what_was_begun_and_generates_nothing_while_its_ranks_train(
    own_runs: Runs, tmp_path, on_update
):
    """`rollout.partial`. The engine's weights are called "released" between the batch and the new weights: tokens of
    that time would make the driver throw their response away and ask for it again."""
    run_dir = tmp_path / "run"
    settings = ("rollout.partial=true", "rollout.max_staleness=1", f"rollout.on_update={on_update}")
    uneven = ("rollout.max_response_tokens=256", f"rollout.stop_token_ids={list(range(8))}")  # lengths, 64 in the mean
    rows = own_runs.train(run_dir, "num_steps=4", *COLOCATED, *settings, *uneven)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert sum(row["rollout/carried_over"] for row in rows) > 0
    assert all(row["rollout/reissued"] == row["rollout/engines_lost"] == 0 for row in rows)
    assert all(row["staleness/max"] <= 1 for row in rows)
    # An update of 1e-6 lies between a carried token and its training; tails on lost keys and values would differ more.
    assert all(row["mismatch_max"] < 1e-3 for row in rows), rows
    taken = manifests(run_dir)[:4]
    assert [m["rollout_state_after"]["consumed"] for m in taken] == [3, 6, 9, 12]
    assert len({problem for m in taken for problem in m["problems"]}) == 12, "a prompt was repeated or lost"
