"""When the driver cannot do what it should, or its parent is gone: an error with its cause, never a hang."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
from driver_runs import Drivers, alive, configure, make_demo, wait_until

from asyppo_megatron.config import Config
from asyppo_megatron.rollout import journal
from asyppo_megatron.rollout.client import DriverClient, RolloutError, start_driver
from asyppo_megatron.rollout.server import serve


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    return make_demo(tmp_path_factory.mktemp("driver") / "demo")


@pytest.fixture
def drivers():
    drivers = Drivers()
    yield drivers
    drivers.close()


def test_an_error_in_generation_is_told_by_wait(demo, drivers, tmp_path):
    handle = drivers.start(configure(demo), tmp_path)
    handle.client.load_weights(demo / "w2", 2)
    handle.client.start(0, 2)
    with pytest.raises(RolloutError, match="rollouts of step 0: RuntimeError: .* not finite under policy_version 2"):
        handle.client.wait(0, 60)
    assert journal.journalled_steps(tmp_path) == []
    assert "Traceback" not in handle.client.hello()  # and it still answers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"train": "/nowhere.jsonl"}}, "/nowhere.jsonl: cannot be read"),
        ({"data": {"tokenizer": "/nowhere"}}, "tokenizer /nowhere: no such directory"),
        ({"data": {"chat_template": "system"}}, "set data.chat_template=none"),
        ({"reward": {"answer_pattern": "("}}, "reward.answer_pattern"),
    ],
)
def test_a_driver_that_cannot_start_says_why_and_ends(demo, drivers, tmp_path, change, message):
    handle = drivers.start(configure(demo, **change), tmp_path)
    with pytest.raises(RolloutError, match=f"rollout driver: did not start: .*{message}"):
        handle.client.hello()
    handle.process.join(10)
    assert handle.process.exitcode == 0
    assert "Traceback" in (tmp_path / "logs" / "driver.log").read_text()


def _parent(config: Config, run_dir: Path, pids) -> None:
    handle = start_driver(config, run_dir)
    handle.client.hello()
    pids.send((handle.process.pid, handle.directory))
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_driver_dies_with_its_parent(demo, tmp_path):
    ours, theirs = multiprocessing.Pipe(duplex=False)
    parent = multiprocessing.get_context("fork").Process(target=_parent, args=(configure(demo), tmp_path, theirs))
    parent.start()
    driver, directory = ours.recv()
    parent.join()
    wait_until(lambda: not alive(driver), "the driver outlived its parent")
    shutil.rmtree(directory)


def test_no_connection_is_an_error_with_the_path(tmp_path):
    with pytest.raises(RolloutError, match=r"no connection to .*/none"):
        DriverClient(tmp_path / "none", timeout_s=0.1)


def test_a_socket_path_too_long_for_the_kernel_is_refused(demo, tmp_path):
    with pytest.raises(ValueError, match="need <= 107"):
        serve(configure(demo), tmp_path, tmp_path / ("x" * 120))
