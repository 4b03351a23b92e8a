"""What ends a run that does not get on: the board, who is named, counted failures, finite timeouts, allocations."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from asyppo_megatron.config import ConfigError, load_config
from asyppo_megatron.launch import allocation
from asyppo_megatron.launch.attempts import GivenUp, attempt
from asyppo_megatron.launch.command import place_of
from asyppo_megatron.launch.failure import Failure, RankFailed, Stopped, explain
from asyppo_megatron.launch.hang import HangDetector, Watch, describe
from asyppo_megatron.launch.peers import Peers, Place, open_store
from asyppo_megatron.launch.processes import Child
from asyppo_megatron.observability.board import StatusBoard, answer_questions, pending_collective

PACKAGE = Path(__file__).resolve().parents[2] / "asyppo_megatron"
ROLES = {"actor": (0, 1), "critic_0": (2,), "critic_1": (3,)}


# --- the board


def test_a_board_shows_where_each_rank_is_and_goes_back_to_the_outer_phase():
    board = StatusBoard(2)
    slot = board.slot(1)
    slot.begin_step(7)
    with slot.during("rollouts", 50.0), slot.during("batch", 5.0, "actor"):
        status = board.read(1)
        assert (status.step, status.phase, status.role, status.deadline_s) == (7, "batch", "actor", 5.0)
    status = board.read(1)
    assert (status.step, status.phase, status.is_late) == (7, "start", False)
    assert board.read(0).step == 0


def test_a_rank_is_late_only_after_its_deadline_and_never_without_one():
    board = StatusBoard(1)
    board.slot(0).enter("exchange", "", 0.01)
    time.sleep(0.02)
    assert board.read(0).is_late
    board.slot(0).enter("exchange", "", 0.0)
    time.sleep(0.02)
    assert not board.read(0).is_late


def test_the_board_keeps_the_place_where_an_error_arose():
    board = StatusBoard(1)
    with pytest.raises(KeyError), board.slot(0).during("exchange", 1.0):
        raise KeyError
    assert board.read(0).phase == "exchange"


def test_ranks_hear_that_they_are_to_stop_and_answer_what_they_wait_for():
    board = StatusBoard(1)
    slot = board.slot(0)
    answer_questions(slot, lambda: "gloo:all_reduce")
    assert not slot.stop_requested and not board.read(0).has_answered
    board.request_stop()
    board.ask()
    deadline = time.monotonic() + 30
    while not board.read(0).has_answered and time.monotonic() < deadline:
        time.sleep(0.02)
    assert slot.stop_requested and board.read(0).waits_in == "gloo:all_reduce"
    board.ask()
    assert board.read(0).waits_in == ""  # of the last question


def test_the_oldest_collective_that_has_not_ended_is_the_pending_one():
    def entry(number: int, *, retired: bool = False, state: str = "scheduled") -> dict:
        group = ["3", "actor.tp of ranks 0, 1"]
        return {
            "retired": retired,
            "state": state,
            "process_group": group,
            "profiling_name": "gloo:all_reduce",
            "collective_seq_id": number,
            "input_sizes": [[3]],
        }

    entries = [entry(1, retired=True), entry(2, state="completed"), entry(3), entry(4)]
    trace = json.dumps({"entries": entries}).encode()
    assert pending_collective(trace) == "gloo:all_reduce number 3 of group actor.tp of ranks 0, 1 [[3]]"
    assert pending_collective(b'{"entries": []}') == ""


# --- who is named


def finding(rank: int, phase: str, **more) -> dict:
    base = {"rank": rank, "pid": 100 + rank, "state": "S", "step": 4, "phase": phase, "role": "", "seconds": 30.0}
    return base | {"answers": True, "waits_in": "gloo:all_reduce number 9 of group world"} | more


def test_a_stopped_rank_is_named_with_its_role_and_what_the_others_wait_for():
    group = "gloo:all_reduce number 7 of group actor.tp of ranks 0, 1"
    found = [
        finding(0, "actor_update", role="actor", waits_in=group),
        finding(1, "actor_update", role="actor", state="T", answers=False, waits_in=""),
        finding(2, "metrics"),
    ]
    assert describe(found, ROLES) == (
        "step 4: no progress for 30 s; rank 1 (actor; process 101) is stopped by a signal in actor_update; waiting for "
        f"it: rank 0 in actor_update of actor for {group}, rank 2 in metrics for gloo:all_reduce number 9 of group "
        "world; stacks of the ranks that answer (0, 2) are in their logs"
    )


def test_without_a_stopped_rank_the_one_that_is_silent_then_the_one_outside_collectives_is_named():
    silent = [finding(0, "metrics"), finding(3, "critic_update", answers=False, waits_in="")]
    assert "rank 3 (critic_1; process 103) does not answer in critic_update" in describe(silent, ROLES)
    busy = [finding(0, "metrics"), finding(2, "critic_update", role="critic_0", waits_in="")]
    assert "rank 2 (critic_0; process 102) is behind in critic_update" in describe(busy, ROLES)


def test_when_all_wait_those_of_the_oldest_step_that_wait_longest_are_named():
    found = [finding(0, "metrics", seconds=30.0), finding(1, "exchange", seconds=50.0), finding(2, "batch", step=5)]
    assert "rank 1 (actor; process 101) is behind in exchange" in describe(found, ROLES)


def test_a_rank_that_a_signal_stopped_is_found_whatever_it_does():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        board = StatusBoard(1)
        board.slot(0).enter("rollouts", "", 5000.0)
        child = Child(0, process.pid, -1, -1)
        detector = HangDetector(Watch(board, ROLES, 1.0, 0.2), [child], Peers(dist.HashStore(), Place()))
        assert detector.poll() is None
        os.kill(process.pid, signal.SIGSTOP)
        found, deadline = None, time.monotonic() + 30
        while found is None and time.monotonic() < deadline:
            time.sleep(0.05)
            found = detector.poll()
        assert f"rank 0 (actor; process {process.pid}) is stopped by a signal in rollouts" in found.message
    finally:
        process.kill()
        process.wait()


def test_weights_that_ranks_of_another_node_write_go_where_all_nodes_read(monkeypatch, tmp_path):
    from asyppo_megatron.run import _shared_directory

    def directory(*overrides: str) -> Path | None:
        demo = PACKAGE.parent / "model_configs/runs/demo.yaml"
        return _shared_directory(load_config(demo, [f"run_dir={tmp_path}", *overrides]))

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert directory() is None, "shared memory serves where all writers are on the first node"
    assert directory("actor.ranks=2-3", "critics.0.ranks=0", "critics.1.ranks=1") == tmp_path / "weights"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert directory("actor.ranks=2-3", "critics.0.ranks=0", "critics.1.ranks=1") is None


def test_a_killed_rank_explains_earlier_errors_of_others():
    lost, killed, coded = Failure(1, 1.0, "lost a peer"), Failure(0, 2.0, "killed"), Failure(2, 0.0, "exit code 1")
    assert explain([lost, killed, coded]) is killed
    assert explain([coded, lost, Failure(1, 0.5, "first")]).message == "first"


# --- several nodes


def test_launchers_hear_of_each_others_failures_stops_and_findings():
    place = Place(2, 0, "127.0.0.1", 0)
    store = open_store(place)
    other = open_store(Place(2, 1, "127.0.0.1", store.port))
    zero, one = Peers(store, place), Peers(other, Place(2, 1, "127.0.0.1", store.port))
    assert zero.poll() is None and one.poll() is None and not one.hears_stop() and not zero.all_done
    zero.announce_stop()
    assert one.hears_stop()
    one._set("findings/1", json.dumps([finding(3, "metrics")]))
    assert [f["rank"] for f in zero.gather_findings([finding(0, "metrics")], 10.0)] == [0, 3]
    one.first_failure([Failure(0, 5.0, "rank 3 was killed")])
    heard = zero.first_failure([Failure(1, 4.0, "rank 0 lost a peer")])
    assert heard.message == "rank 3 was killed"
    one.close()
    zero.close(patience_s=30.0)  # a key that is set is there a moment later
    assert zero.all_done


def test_a_launcher_whose_first_node_is_gone_says_so():
    place = Place(2, 0, "127.0.0.1", 0)
    store = open_store(place)
    at_one = Place(2, 1, "127.0.0.1", store.port)
    one = Peers(open_store(at_one), at_one)
    assert one.poll() is None
    del store
    assert one.poll().message.startswith("node 0: its launcher ended")


@pytest.mark.parametrize(
    ("nodes", "node", "rendezvous", "message"),
    [
        (2, 2, "h:1", "--node: got 2 of 2 nodes, need 0 to 1"),
        (2, 0, "host", "--rendezvous: got 'host', need HOST:PORT"),
    ],
)
def test_a_wrong_place_is_refused(nodes, node, rendezvous, message):
    with pytest.raises(ValueError, match=message):
        place_of(nodes, node, rendezvous)


def test_ranks_divide_over_nodes_or_are_refused():
    assert [list(Place(2, node).ranks(4)) for node in (0, 1)] == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match="nodes: got 3 for 4 ranks, need a divisor of 4"):
        Place(3).ranks(4)


# --- counted failures


def fail(run_dir: Path, job: str = "1") -> None:
    with attempt(run_dir, job):
        raise RankFailed("rank 3 was killed")


def save(run_dir: Path, step: int) -> None:
    (run_dir / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)


def test_the_third_failure_without_a_new_checkpoint_is_the_last(tmp_path):
    save(tmp_path, 4)
    for _ in range(2):
        with pytest.raises(RankFailed):
            fail(tmp_path)
    with pytest.raises(GivenUp, match="3 starts of this job that failed without getting past the checkpoint of step 4"):
        fail(tmp_path)
    with pytest.raises(GivenUp), attempt(tmp_path, "1"):
        pytest.fail("was started a fourth time")


def test_progress_stops_and_another_job_begin_the_count_anew(tmp_path):
    for _ in range(2):
        with pytest.raises(RankFailed):
            fail(tmp_path)
    with pytest.raises(Stopped), attempt(tmp_path, "1"):
        raise Stopped(15, is_saved=True)
    save(tmp_path, 2)
    for _ in range(2):
        with pytest.raises(RankFailed):
            fail(tmp_path)
    with attempt(tmp_path, "2"):
        pass
    assert [s["ended"] for s in json.loads((tmp_path / "attempts.json").read_text())["starts"]] == ["finished"]


def test_a_start_that_vanished_with_its_node_counts(tmp_path):
    starts = [{"at": "t", "checkpoint": None, "ended": None}] * 2
    (tmp_path / "attempts.json").write_text(json.dumps({"job": "1", "starts": starts}))
    with pytest.raises(GivenUp, match="vanished, with its node"):
        fail(tmp_path)


# --- timeouts

NEEDS_TIMEOUT = {
    "new_group": "timeout",
    "init_process_group": "timeout",
    "urlopen": "timeout",
    "HTTPConnection": "timeout",
    "HTTPSConnection": "timeout",
    "create_connection": "timeout",
}
REQUESTS = {"get", "post", "put", "request", "Client", "AsyncClient"}  # of requests and httpx


def calls_without_timeout(source: str) -> list[str]:
    """Calls that would wait for ever: groups whose collectives have torch's own limit, and HTTP."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        last = name.split(".")[-1]
        is_request = name.split(".")[0] in ("requests", "httpx") and last in REQUESTS
        needed = NEEDS_TIMEOUT.get(last, "timeout" if is_request else None)
        is_positional = last == "create_connection" and len(node.args) > 1
        if needed and not is_positional and needed not in {k.arg for k in node.keywords}:
            found.append(f"{node.lineno}: {name}")
    return found


def test_every_collective_and_every_http_call_has_a_finite_timeout():
    found = {str(p): c for p in PACKAGE.rglob("*.py") if (c := calls_without_timeout(p.read_text()))}
    assert not found
    assert calls_without_timeout("dist.new_group([0])\nrequests.get(u)\nurlopen(u, timeout=3)") == [
        "1: dist.new_group",
        "2: requests.get",
    ]


# --- allocations


def test_an_allocation_that_does_not_fit_is_refused_with_what_to_ask_for(monkeypatch, tmp_path):
    monkeypatch.setattr(allocation, "check_run", lambda config: None)
    demo = PACKAGE.parent / "model_configs/runs/demo.yaml"
    config = load_config(demo, [f"run_dir={tmp_path / 'run'}"])
    facts = allocation.check_allocation(config, 2, 8)
    assert facts["ranks_per_node"] == "2" and facts["engine"] == "embedded"
    assert "run_dir='/a b'" in allocation.shell_lines({"run_dir": "/a b"})
    with pytest.raises(ConfigError, match=r"GPUs: got 2 node\(s\) of 1, need 2 a node.*--nodes=4"):
        allocation.check_allocation(config, 2, 1)
    with pytest.raises(ConfigError, match="nodes: got 3 for 4 ranks, need a divisor of 4"):
        allocation.check_allocation(config, 3, None)
