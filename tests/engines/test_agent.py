"""The node agent keeps a real engine running, says how it is, and leaves nothing behind, however it ends."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from agent_processes import (
    GONE_S,
    AgentProcess,
    assert_gone,
    end,
    is_alive,
    start_agent,
    start_owner,
    wait_until,
)
from engine_runs import write_run
from engine_servers import START_S

from asyppo_megatron.rollout.agents import AgentClient, AgentError, address_path, read_address

# Deadlines are generous, because the machine may be busy; an engine that is taken for hung without being so costs a
# restart, which no test minds.
PATIENT = {"health_interval_s": 1.0, "health_timeout_s": 10.0, "restart_backoff_s": 0.5, "max_restarts": 20}


@pytest.fixture(autouse=True)
def no_agent_left(tmp_path: Path) -> Iterator[None]:
    """Agents of runs outlive these; one of a test that failed must not."""
    yield
    with contextlib.suppress(AgentError):
        AgentClient(read_address(address_path(tmp_path / "run")).url).shutdown()


@pytest.fixture
def agent(engine_model: Path, tmp_path: Path) -> Iterator[AgentProcess]:
    agent = start_agent(write_run(engine_model, tmp_path / "run", **PATIENT))
    yield agent
    end(agent.process)


def test_a_killed_and_a_hung_engine_are_started_again_and_sigterm_leaves_nothing(agent: AgentProcess):
    first = agent.wait_for(lambda row: len(row["pids"]) >= 1)
    os.kill(first["pids"][0], signal.SIGKILL)
    second = agent.wait_for(lambda row: row["incarnation"] != first["incarnation"] and row["state"] == "ready")
    assert second["incarnation"] > first["incarnation"]
    assert second["restarts"] >= 1
    assert_gone(first["pids"], first["url"])
    assert requests.get(second["url"] + "/model_info", timeout=60).status_code == 200

    scheduler = next(pid for pid in second["pids"] if "scheduler" in Path(f"/proc/{pid}/cmdline").read_text())
    os.kill(scheduler, signal.SIGSTOP)  # the HTTP server lives on, and says nothing
    third = agent.wait_for(lambda row: row["incarnation"] > second["incarnation"] and row["pids"])
    assert "hung: no answer" in third["reason"]
    assert_gone(second["pids"], second["url"])
    assert len({first["url"], second["url"], third["url"]}) == 3

    assert agent.signal(signal.SIGTERM) == 0
    assert_gone(agent.seen, agent.client.url, third["url"])
    assert not agent.address_file.exists()


def test_an_agent_that_is_killed_leaves_no_process(agent: AgentProcess):
    row = agent.wait_for(lambda row: len(row["pids"]) >= 1)
    assert agent.signal(signal.SIGKILL) == -signal.SIGKILL
    assert_gone(agent.seen, agent.client.url, row["url"])


def test_an_engine_that_cannot_start_is_given_up_with_its_reason_and_started_again_on_request(tmp_path: Path):
    few = PATIENT | {"max_restarts": 1}
    agent = start_agent(write_run(tmp_path / "no-such-model", tmp_path / "run", **few))
    try:
        row = agent.wait_for(lambda row: row["state"] == "failed")
        for part in ("ended with", "given up after 1 restart", "max_restarts", row["log"], "no-such-model"):
            assert part in row["reason"]
        assert "no-such-model" in Path(row["log"]).read_text()
        assert (row["url"], row["pids"]) == ("", [])
        agent.client.restart(row["id"])
        agent.wait_for(lambda again: again["incarnation"] > row["incarnation"])
        with pytest.raises(AgentError, match="unknown"):
            agent.client.restart("nobody")
    finally:
        end(agent.process)
    assert_gone(agent.seen, agent.client.url)


def test_the_next_start_of_a_crashed_run_takes_its_agent_up_and_a_finished_run_ends_it(engine_model, tmp_path):
    config = write_run(engine_model, tmp_path / "run", **PATIENT)
    crashed, found = start_owner(config)
    engine = wait_until(AgentClient(found["url"]).engines, lambda rows: len(rows[0]["pids"]) > 0, START_S)[0]
    crashed.kill()
    crashed.wait()
    assert is_alive(found["pid"])

    again, found_again = start_owner(config)
    assert found_again == found
    assert AgentClient(found["url"]).engines()[0]["incarnation"] == engine["incarnation"]

    again.communicate("finish\n", timeout=GONE_S)
    assert again.returncode == 0
    assert_gone([found["pid"], *engine["pids"]], found["url"], engine["url"])
    assert not address_path(tmp_path / "run").exists()


def test_an_agent_whose_run_does_not_come_back_ends_itself(engine_model: Path, tmp_path: Path):
    crashed, found = start_owner(write_run(engine_model, tmp_path / "run", linger_s=1.0))
    engine = wait_until(AgentClient(found["url"]).engines, lambda rows: len(rows[0]["pids"]) > 0, START_S)[0]
    crashed.kill()
    crashed.wait()
    assert_gone([found["pid"], *engine["pids"]], found["url"])


@pytest.mark.slow
def test_a_run_configured_otherwise_does_not_take_the_old_engines(engine_model: Path, tmp_path: Path):
    crashed, found = start_owner(write_run(engine_model, tmp_path / "run"))
    crashed.kill()
    crashed.wait()
    other, found_other = start_owner(write_run(engine_model, tmp_path / "run", context_length=512))
    assert found_other["pid"] != found["pid"]
    assert not is_alive(found["pid"])
    assert read_address(address_path(tmp_path / "run")).pid == found_other["pid"]
    other.communicate("finish\n", timeout=GONE_S)
    assert_gone([found_other["pid"]], found_other["url"])


@pytest.mark.slow
def test_colocated_engines_are_ready_before_the_run_begins_and_started_again_after_a_crash(engine_model, tmp_path):
    config = write_run(engine_model, tmp_path / "run", placement="colocated", **PATIENT)
    crashed, found = start_owner(config)
    (before,) = AgentClient(found["url"]).engines()
    assert before["state"] == "ready"
    crashed.kill()
    crashed.wait()
    again, found_again = start_owner(config)
    (after,) = AgentClient(found["url"]).engines()
    assert found_again == found
    assert after["state"] == "ready"
    assert after["incarnation"] > before["incarnation"]
    again.communicate("finish\n", timeout=GONE_S)
    assert_gone([found["pid"], *before["pids"], *after["pids"]], found["url"], after["url"])
