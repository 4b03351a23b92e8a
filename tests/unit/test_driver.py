"""The driver as the trainer sees it: a real process with a tiny random model."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from driver_runs import GROUPS, SAMPLES, Drivers, alive, assert_equal, configure, copy_of, make_demo, wait_until

from asyppo_megatron.rollout import journal
from asyppo_megatron.rollout.client import DriverClient, RolloutError, start_driver


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    return make_demo(tmp_path_factory.mktemp("driver") / "demo")


@pytest.fixture
def drivers():
    drivers = Drivers()
    yield drivers
    drivers.close()


@pytest.fixture(scope="module")
def run(demo, tmp_path_factory):
    """A driver with weights of version 0 whose step 0 is in the journal, and its run directory."""
    run_dir = tmp_path_factory.mktemp("run")
    handle = start_driver(configure(demo), run_dir)
    handle.client.load_weights(demo / "w0", 0)
    handle.client.start(0, 0)
    assert handle.client.wait(0, 60)
    yield handle, run_dir
    handle.close()
    assert handle.process.exitcode == 0
    assert not handle.directory.exists()


def test_a_step_is_journalled_in_group_order_with_its_statistics(run):
    _, run_dir = run
    arrays, manifest = journal.load_step(run_dir, 0)
    assert arrays["group_ids"].tolist() == [g for g in range(GROUPS) for _ in range(SAMPLES)]
    assert set(arrays["versions"]) == {0} and isinstance(arrays["tokens"], np.memmap)
    statistics = manifest["statistics"]
    assert (manifest["step"], manifest["policy_version"], manifest["seed"]) == (0, 0, 5)
    assert manifest["rollout_state_after"]["consumed"] == GROUPS
    assert statistics["generated_tokens"] == arrays["loss_mask"].sum()
    assert statistics["response_length"] == pytest.approx(arrays["loss_mask"].sum() / (GROUPS * SAMPLES))
    assert statistics["truncation_rate"] == pytest.approx(arrays["truncated"].mean())
    assert statistics["reward"] == pytest.approx(arrays["rewards"].mean())
    assert statistics["reward_status"] == {"ok": GROUPS * SAMPLES}
    assert 0.3 < statistics["kept_mass"] < 1.0
    assert (arrays["rollout_logprobs"][arrays["loss_mask"]] < 0).all()
    samples = [json.loads(line) for line in (journal.step_directory(run_dir, 0) / "samples.jsonl").open()]
    assert len(samples) == 8 and samples[0]["problem"].startswith("^") and "response" in samples[0]


def test_hello_says_what_the_driver_found(run):
    handle, _ = run
    hello = handle.client.hello()
    assert hello["pid"] == handle.process.pid != os.getpid()
    assert (hello["num_problems"], hello["num_skipped"], hello["stop_token_ids"]) == (20, 0, [0])


def test_evaluation_keeps_every_problem(run):
    handle, run_dir = run
    (result,) = handle.client.evaluate(3)
    rows = [json.loads(line) for line in (run_dir / "eval" / "step-000003" / "heldout.jsonl").open()]
    assert (result["name"], result["k"], result["num_problems"], len(rows)) == ("heldout", 2, 6, 6)
    assert result["greedy"] == pytest.approx(np.mean([r["greedy"] for r in rows]))
    assert result["avg_at_k"] == pytest.approx(np.mean([r["samples"] for r in rows]))
    assert all(len(r["samples"]) == 2 and {"id", "answer", "response"} <= r.keys() for r in rows)
    assert handle.client.evaluate(4) == [result], "the same weights and random numbers, the same result"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c, d: c.start(1, 3), "start of step 1: got policy_version 3, but the engine has 0"),
        (lambda c, d: c.wait(9, 0), "wait: got step 9, but step 0 was started"),
        (lambda c, d: c.load_weights(d / "w0", 4), "got policy_version 0, need 4"),
        (lambda c, d: c.load_weights(d, 0), "got no weights.json"),
        (lambda c, d: c.evaluate(0, ["other"]), r"evaluate: got sets \['other'\], need some of \['heldout'\]"),
        (lambda c, d: c.restore({"consumed": 1, "fingerprint": "x"}), "got a dataset with fingerprint"),
        (lambda c, d: c._call("dance", 5), "driver: got command 'dance', need one of"),
        (lambda c, d: c._call("start", 5), "missing 2 required positional arguments"),
    ],
)
def test_a_command_that_cannot_be_done_is_an_answer_and_the_driver_lives_on(run, demo, call, message):
    handle, _ = run
    with pytest.raises(RolloutError, match=message):
        call(handle.client, demo)
    assert handle.client.hello()["policy_version"] == 0


def test_another_client_may_follow(run):
    handle, _ = run
    handle.client.close()
    with pytest.raises(RolloutError, match="hello after the connection was lost"):
        handle.client.hello()
    handle.client = DriverClient(handle.directory / "driver")
    assert handle.client.hello()["policy_version"] == 0


def test_rollouts_depend_on_seed_and_step_but_not_on_the_batch_size(demo, drivers, tmp_path, run):
    _, run_dir = run
    expected = copy_of(journal.load_step(run_dir, 0)[0])
    handle = drivers.start(configure(demo, rollout={"max_batch": 3}), tmp_path)
    handle.client.load_weights(demo / "w0", 0)
    handle.client.start(0, 0)
    assert handle.client.wait(0, 60)
    arrays = copy_of(journal.load_step(tmp_path, 0)[0])
    np.testing.assert_allclose(arrays.pop("rollout_logprobs"), expected.pop("rollout_logprobs"), atol=1e-5)
    assert_equal(arrays, expected)


def test_math_rewards_come_from_processes_of_the_driver(demo, drivers, tmp_path):
    handle = drivers.start(configure(demo, reward={"kind": "math", "workers": 1}), tmp_path)
    handle.client.load_weights(demo / "w0", 0)
    handle.client.start(0, 0)
    assert handle.client.wait(0, 60)
    status = journal.load_step(tmp_path, 0)[1]["statistics"]["reward_status"]
    assert sum(status.values()) == GROUPS * SAMPLES and status["ok"] > 0
    pid = handle.process.pid
    (verifier,) = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    handle.close()
    wait_until(lambda: not alive(verifier), "the verifier outlived the driver")


def test_a_killed_driver_is_noticed_and_its_complete_steps_are_replayed(demo, drivers, tmp_path):
    config = configure(demo)
    first = drivers.start(config, tmp_path)
    first.client.load_weights(demo / "w0", 0)
    for step in range(2):
        first.client.start(step, 0)
        assert first.client.wait(step, 60)
    arrays = [copy_of(journal.load_step(tmp_path, step)[0]) for step in range(2)]
    first.client.start(2, 0)
    os.kill(first.process.pid, signal.SIGKILL)
    with pytest.raises(RolloutError, match=r"died during wait .*driver.log"):
        first.client.wait(2, 60)
    shutil.rmtree(journal.step_directory(tmp_path, 2), ignore_errors=True)
    (tmp_path / "rollouts" / ".step-000002.part").mkdir()
    shutil.copytree(journal.step_directory(tmp_path, 1), tmp_path / "kept")

    second = drivers.start(config, tmp_path)
    second.client.load_weights(demo / "w0", 0)
    assert not (tmp_path / "rollouts" / ".step-000002.part").exists()
    assert second.client.start(0, 0) is True and second.client.wait(0, 0)
    assert second.client.hello()["rollout_state"]["consumed"] == GROUPS
    (journal.step_directory(tmp_path, 1) / "tokens.npy").write_bytes(b"damaged")
    assert second.client.start(1, 0) is False and second.client.wait(1, 60)
    assert_equal(copy_of(journal.load_step(tmp_path, 1)[0]), arrays[1])
    assert second.client.start(2, 0) is False and second.client.wait(2, 60)

    state = second.client.hello()["rollout_state"]
    second.client.restore({**state, "consumed": GROUPS})
    second.client.load_weights(demo / "w1", 1)
    assert second.client.start(1, 1) is False, "a step of other weights is no replay"
    assert second.client.wait(1, 60)
    newer = copy_of(journal.load_step(tmp_path, 1)[0])
    assert set(newer["versions"]) == {1} and newer["tokens"].tolist() != arrays[1]["tokens"].tolist()
    assert journal.journalled_steps(tmp_path) == [0, 1, 2]
    journal.prune(tmp_path, 2)
    assert journal.journalled_steps(tmp_path) == [2]


def test_ctrl_c_is_left_to_the_parent(run):
    handle, _ = run
    os.kill(handle.process.pid, signal.SIGINT)
    assert handle.client.hello()["policy_version"] == 0


def test_a_call_without_an_answer_ends_at_its_deadline(run):
    handle, _ = run
    os.kill(handle.process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(RolloutError, match="no answer to hello within 1 s"):
            handle.client.hello(timeout_s=1.0)
    finally:
        os.kill(handle.process.pid, signal.SIGCONT)
    handle.client = DriverClient(handle.directory / "driver")
    handle.client.hello()


def test_a_spawned_driver_does_the_same(demo, tmp_path, run):
    _, run_dir = run
    handle = start_driver(configure(demo), tmp_path, start_method="spawn")
    try:
        handle.client.load_weights(demo / "w0", 0)
        handle.client.start(0, 0)
        assert handle.client.wait(0, 60)
        arrays = [copy_of(journal.load_step(d, 0)[0]) for d in (tmp_path, run_dir)]
        for a in arrays:
            a.pop("rollout_logprobs")  # equal but for rounding
        assert_equal(*arrays)
    finally:
        handle.close()
