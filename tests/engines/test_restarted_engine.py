"""The only engine of a run is killed while it generates: it comes back empty and gets the weights once more."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from agent_processes import assert_gone, end, wait_until
from test_own_agent import LIMIT_S, start_run, write_run

from asyppo_megatron.observability.metrics import read_metrics
from asyppo_megatron.rollout.agents import AgentClient, address_path, read_address

STEPS, RESPONSES = 3, 8


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
    settings: tuple[str, ...], engine_model: Path, tmp_path: Path
) -> None:
    path, run_dir = write_run(engine_model, tmp_path), tmp_path / "run"
    long = ["rollout.max_response_tokens=224", "checkpoint.every=0"]  # it is killed while it generates
    run = start_run(path, f"num_steps={STEPS}", "actor.ranks=0-1", "actor.layout.tp=2", *long, *settings)
    log = run_dir / "logs" / "rank-00000.log"

    def logged(line: str) -> bool:
        assert run.poll() is None, (tmp_path / "train.log").read_text()[-4000:]
        return log.exists() and line in log.read_text()

    try:
        wait_until(lambda: logged(f"weight sync: version {STEPS - 1} on 1 engines"), bool, LIMIT_S)
        agent = AgentClient(read_address(address_path(run_dir)).url)
        (before,) = agent.engines()
        for pid in before["pids"]:
            os.kill(pid, signal.SIGKILL)
        (after,) = wait_until(agent.engines, lambda rows: rows[0]["restarts"] and rows[0]["url"], LIMIT_S)
        assert run.wait(LIMIT_S) == 0, (tmp_path / "train.log").read_text()[-4000:]
    finally:
        end(run)
    assert log.read_text().count("pushing them again") == 1
    rows = [row for row in read_metrics(run_dir / "metrics.jsonl") if "reward" in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert sum(row["rollout/engines_lost"] for row in rows) == 1 and sum(row["rollout/reissued"] for row in rows)
    manifests = [json.loads(p.read_text()) for p in sorted((run_dir / "rollouts").glob("step-*/manifest.json"))]
    assert [m["statistics"]["reward_status"] for m in manifests[:STEPS]] == [{"ok": RESPONSES}] * STEPS
    if "rollout.max_staleness=1" not in settings:  # there the mismatch holds the staleness too
        assert all(row["mismatch_max"] < 1e-4 for row in rows), "the engine did not have the actor's weights"
    assert_gone([*before["pids"], *after["pids"]], agent.url, before["url"], after["url"])
