"""Asynchronous rollouts with the embedded engine: weights change between two tokens, and batches run ahead."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from driver_runs import GROUPS, SAMPLES, Drivers, assert_equal, configure, copy_of, make_demo
from transformers import Qwen3ForCausalLM

from asyppo_megatron.rollout import journal
from asyppo_megatron.rollout.client import RolloutError
from asyppo_megatron.rollout.embedded import EmbeddedEngine
from asyppo_megatron.rollout.engine import GenerationRequest


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    return make_demo(tmp_path_factory.mktemp("async") / "demo")


@pytest.fixture
def drivers():
    drivers = Drivers()
    yield drivers
    drivers.close()


def requests(count: int, tokens: int) -> list[GenerationRequest]:
    return [GenerationRequest(i, np.array([3, 4, 5], dtype=np.int32), tokens, seed=i) for i in range(count)]


class Swap(EmbeddedEngine):
    """Has another thread load weights while token `at` is computed, and waits until they are asked for."""

    def plan(self, at: int, path: Path, version: int) -> None:
        self._at, self._passes, self._new = at, 0, (path, version)

    def _forward(self, *args):
        self._passes += 1
        if self._passes == self._at + 1:
            loader = threading.Thread(target=self.load_weights, args=self._new)
            loader.start()
            loader.join()
        return super()._forward(*args)


def logprobs_of(directory: Path, prompt: list[int], response: np.ndarray) -> np.ndarray:
    """Of a response under one version's weights, by Hugging Face without a cache."""
    model = Qwen3ForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response.tolist()]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(response.astype(np.int64))[:, None])[:, 0].numpy()


def test_weights_that_come_in_mid_response_are_used_from_the_next_token_on(demo):
    engine = Swap(demo / "w0", torch.float32, torch.device("cpu"), 8)
    engine.load_weights(demo / "w0", 0)
    engine.plan(5, demo / "w1", 1)
    completions = list(engine.generate(requests(4, 12)))
    plain = EmbeddedEngine(demo / "w0", torch.float32, torch.device("cpu"), 8)
    plain.load_weights(demo / "w0", 0)
    for new, old in zip(completions, plain.generate(requests(4, 12)), strict=True):
        assert (new.policy_version, new.version_spans) == (0, ((0, 0), (5, 1)))
        assert (old.policy_version, old.version_spans) == (0, ())
        np.testing.assert_array_equal(new.tokens[:5], old.tokens[:5])
        np.testing.assert_allclose(new.logprobs[:5], logprobs_of(demo / "w0", [3, 4, 5], new.tokens)[:5], atol=1e-5)
        assert not np.allclose(new.logprobs[5:], old.logprobs[5:], atol=1e-3)
    assert engine.policy_version == 1


def test_a_paused_engine_computes_nothing_until_it_goes_on(demo):
    engine = EmbeddedEngine(demo / "w0", torch.float32, torch.device("cpu"), 8)
    engine.load_weights(demo / "w0", 0)
    engine.pause()
    found: list = []
    thread = threading.Thread(target=lambda: found.extend(engine.generate(requests(2, 4))))
    thread.start()
    thread.join(0.5)
    assert thread.is_alive() and not found
    engine.load_weights(demo / "w1", 1)
    engine.resume()
    thread.join(60)
    assert [c.policy_version for c in found] == [1, 1]


def config(demo: Path, **rollout):
    return configure(demo, rollout={"max_staleness": 2, **rollout})


def test_batches_run_ahead_as_far_as_the_bound_and_no_further(demo, drivers, tmp_path):
    handle = drivers.start(config(demo), tmp_path)
    handle.client.load_weights(demo / "w0", 0)
    handle.client.start(0, 0)
    assert handle.client.wait(0, 60)
    assert handle.client.evaluate(0)[0]["num_problems"] == 6  # in line behind all that may be generated
    assert journal.journalled_steps(tmp_path) == [0, 1, 2]
    handle.client.load_weights(demo / "w1", 1)
    handle.client.start(1, 1)
    assert handle.client.wait(1, 0), "it was there already"
    handle.client.evaluate(1)
    assert journal.journalled_steps(tmp_path) == [0, 1, 2, 3]
    rows = [journal.load_step(tmp_path, step) for step in range(4)]
    assert [set(arrays["versions"].tolist()) for arrays, _ in rows] == [{0}, {0}, {0}, {1}]
    assert [m["statistics"]["staleness/max"] for _, m in rows] == [0, 1, 2, 2]
    assert all(len(arrays["rewards"]) == GROUPS * SAMPLES for arrays, _ in rows)


def test_prompts_and_their_order_are_those_of_a_synchronous_run(demo, drivers, tmp_path):
    sync, ahead = (drivers.start(c, tmp_path / name) for name, c in (("s", configure(demo)), ("a", config(demo))))
    for handle in (sync, ahead):
        handle.client.load_weights(demo / "w0", 0)
        for step in range(3):
            handle.client.start(step, 0)
            assert handle.client.wait(step, 60)
    for step in range(3):
        (a, ours), (b, theirs) = (journal.load_step(tmp_path / name, step) for name in ("a", "s"))
        assert ours["problems"] == theirs["problems"] and ours["rollout_state_after"] == theirs["rollout_state_after"]
        assert_equal(copy_of(a), copy_of(b))  # the same weights, the same responses


def test_a_restarted_driver_takes_complete_steps_and_begins_the_others_anew(demo, drivers, tmp_path):
    first = drivers.start(config(demo), tmp_path)
    first.client.load_weights(demo / "w0", 0)
    first.client.start(0, 0)
    first.client.wait(0, 60)
    first.client.evaluate(0)
    state = journal.load_step(tmp_path, 0)[1]["rollout_state_after"]
    problems = [journal.load_step(tmp_path, step)[1]["problems"] for step in range(3)]
    first.process.kill()
    journal.prune(tmp_path, 1)  # the checkpoint is after step 1, whose batch was step 0
    shutil.rmtree(journal.step_directory(tmp_path, 2))  # as if it had been under way

    second = drivers.start(config(demo), tmp_path)
    second.client.restore(state)
    second.client.load_weights(demo / "w1", 1)
    assert second.client.start(1, 1) is True and second.client.wait(1, 0)
    second.client.evaluate(1)
    rows = [journal.load_step(tmp_path, step) for step in (1, 2, 3)]
    assert [m["problems"] for _, m in rows[:2]] == problems[1:]
    assert [set(a["versions"].tolist()) for a, _ in rows] == [{0}, {1}, {1}]
    assert not set(rows[2][1]["problems"]) & {p for step in problems for p in step}


def test_a_journalled_batch_that_is_too_stale_is_generated_again(demo, drivers, tmp_path):
    first = drivers.start(config(demo), tmp_path)
    first.client.load_weights(demo / "w0", 0)
    first.client.start(0, 0)
    first.client.evaluate(0)
    state = journal.load_step(tmp_path, 1)[1]["rollout_state_after"]
    first.process.kill()
    second = drivers.start(configure(demo, rollout={"max_staleness": 1}), tmp_path)
    second.client.restore(state)
    second.client.load_weights(demo / "w1", 1)
    second.client.start(2, 1)
    assert second.client.wait(2, 60)
    assert set(journal.load_step(tmp_path, 2)[0]["versions"].tolist()) == {1}, "version 0 was two updates old"


def test_a_failure_ahead_is_told_when_its_step_is_waited_for(demo, drivers, tmp_path):
    handle = drivers.start(config(demo), tmp_path)
    handle.client.load_weights(demo / "w0", 0)
    handle.client.start(0, 0)
    assert handle.client.wait(0, 60)
    handle.client.evaluate(0)
    handle.client.load_weights(demo / "w2", 2)
    handle.client.start(1, 2)
    assert handle.client.wait(1, 60), "generated before"
    handle.client.start(2, 2)
    handle.client.wait(2, 60)
    handle.client.start(3, 2)
    with pytest.raises(RolloutError, match="rollouts of step 3: RuntimeError: .* not finite under policy_version 2"):
        handle.client.wait(3, 60)


def test_partial_rollouts_rest_while_the_ranks_train_and_go_on_with_what_was_begun(demo, drivers, tmp_path):
    handle = drivers.start(config(demo, partial=True, max_staleness=1), tmp_path)
    handle.client.load_weights(demo / "w0", 0)
    handle.client.start(0, 0)
    assert handle.client.wait(0, 60)
    assert journal.journalled_steps(tmp_path) == [0], "step 1 is begun, and rests"
    handle.client.load_weights(demo / "w1", 1)
    handle.client.start(1, 1)
    assert handle.client.wait(1, 60)
    arrays, manifest = journal.load_step(tmp_path, 1)
    assert len(arrays["rewards"]) == GROUPS * SAMPLES and manifest["statistics"]["staleness/max"] <= 1
