"""The only engine of a run is killed while it generates: it comes back empty and gets the weights once more."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from agent_processes import assert_gone, wait_until
from engine_runs import LIMIT_S, Runs, manifests, said, steps, wait_while_running

from asyppo_megatron.rollout.agents import AgentClient, address_path, read_address

STEPS, RESPONSES = 3, 12


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(("weight_sync.transport=collective", "rollout.max_staleness=0"), id="synchronous"),
        pytest.param(("weight_sync.transport=collective", "rollout.max_staleness=1"), id="asynchronous"),
        pytest.param(
            ("weight_sync.transport=ipc", "rollout.sglang.placement=colocated", "actor.offload=all"), id="colocated"
        ),
    ],
)
def test_an_engine_killed_between_two_pushes_gets_the_weights_again_and_no_response_is_lost(
    settings: tuple[str, ...], own_runs: Runs, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    long = ["rollout.max_response_tokens=224", "checkpoint.every=0"]  # it is killed while it generates
    run = own_runs.start(run_dir, f"num_steps={STEPS}", "actor.ranks=0-1", "actor.layout.tp=2", *long, *settings)
    ahead = int("rollout.max_staleness=1" in settings)  # the last batch is begun a version earlier
    log, version = run_dir / "logs" / "rank-00000.log", f"new_version='{STEPS - 1 - ahead}'"

    def generates() -> bool:
        """Whether the engine has begun the last batch; killed before, it would be lost to the push itself."""
        said_by_engine = "".join(path.read_text() for path in log.parent.glob("engine-*.log"))
        return "Prefill batch" in said_by_engine.partition(version)[2]

    wait_while_running(run, run_dir, generates)
    agent = AgentClient(read_address(address_path(run_dir)).url)
    (before,) = agent.engines()
    for pid in before["pids"]:
        os.kill(pid, signal.SIGKILL)
    (after,) = wait_until(agent.engines, lambda rows: rows[0]["restarts"] and rows[0]["url"], LIMIT_S)
    assert run.wait(LIMIT_S) == 0, said(run_dir)
    again = log.read_text().count("pushing them again")
    assert again == 1 or (ahead and again == 0), "ahead, the next push may be the first to meet the new engine"
    rows = steps(run_dir)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert sum(row["rollout/engines_lost"] for row in rows) == 1 and sum(row["rollout/reissued"] for row in rows)
    assert [m["statistics"]["reward_status"] for m in manifests(run_dir)[:STEPS]] == [{"ok": RESPONSES}] * STEPS
    if not ahead:  # there the mismatch holds the staleness too
        assert all(row["mismatch_max"] < 1e-4 for row in rows), "the engine did not have the actor's weights"
    assert_gone([*before["pids"], *after["pids"]], agent.url, before["url"], after["url"])
