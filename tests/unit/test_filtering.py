"""Dynamic sampling and the penalty on length: which groups make a batch, what is counted, and what a resume keeps."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from driver_runs import GROUPS, SAMPLES, Drivers, assert_equal, configure, copy_of, make_demo

from asyppo_megatron.config import FilteringConfig
from asyppo_megatron.rewards.combine import Judgement
from asyppo_megatron.rollout import journal
from asyppo_megatron.rollout.buffer import Group, GroupBuffer
from asyppo_megatron.rollout.dataset import Problem
from asyppo_megatron.rollout.engine import Completion
from asyppo_megatron.rollout.filtering import FilterCounts, count_groups, kept_groups, overlong_penalty
from asyppo_megatron.rollout.scoring import Scored

EQUAL, MIXED = [1.0, 1.0], [0.0, 1.0]
DROP = FilteringConfig(drop_equal_groups=True)


def test_groups_of_equal_rewards_take_no_place():
    line = [MIXED, EQUAL, EQUAL, EQUAL, MIXED, MIXED]
    kept = kept_groups(line, 3, DROP)
    assert kept == [True, False, False, False, True, True]
    assert count_groups(line, kept, 3) == FilterCounts(rounds=3, drawn_groups=6, dropped_groups=3, filled_groups=0)


def test_when_the_rounds_are_used_up_groups_are_taken_as_they_come():
    line = [EQUAL, MIXED, EQUAL, EQUAL, EQUAL]
    kept = kept_groups(line, 3, FilteringConfig(drop_equal_groups=True, max_rounds=2))
    assert kept == [False, True, False, False, True]  # after three dropped groups, a round's worth
    assert count_groups(line, kept, 2) == FilterCounts(rounds=2, drawn_groups=5, dropped_groups=3, filled_groups=1)
    assert kept_groups([EQUAL] * 3, 3, FilteringConfig(drop_equal_groups=True, max_rounds=1)) == [True] * 3


def test_every_batch_in_line_has_rounds_of_its_own():
    config = FilteringConfig(drop_equal_groups=True, max_rounds=2)
    line = [EQUAL, EQUAL, EQUAL, EQUAL, *[EQUAL] * 4]
    assert kept_groups(line, 2, config) == [False, False, True, True] * 2


def test_an_unfinished_group_counts_as_kept_and_changes_nothing_before_it():
    line = [EQUAL, MIXED, None, EQUAL, None]
    kept = kept_groups(line, 3, DROP)
    assert kept == [False, True, True, False, True]
    for rewards in (EQUAL, MIXED):
        assert kept_groups([*line[:2], rewards], 3, DROP)[:2] == kept[:2]


def test_without_the_option_every_group_is_kept():
    assert kept_groups([EQUAL, MIXED, EQUAL], 2, FilteringConfig()) == [True] * 3


def test_counts_add_up():
    assert FilterCounts(1, 4, 2, 0) + FilterCounts(2, 5, 1, 1) == FilterCounts(3, 9, 3, 1)


def test_the_penalty_grows_over_the_buffer():
    config = FilteringConfig(overlong_fraction=0.2)
    found = [overlong_penalty(length, 20, config) for length in (1, 15, 16, 17, 18, 19, 20)]
    assert found == [0, 0, 0, -0.25, -0.5, -0.75, -1.0]
    assert overlong_penalty(20, 20, FilteringConfig(overlong_fraction=0.2, overlong_penalty=0.5)) == -0.5
    assert overlong_penalty(20, 20, FilteringConfig()) == 0.0
    assert overlong_penalty(3, 3, config) == 0.0  # a buffer of less than a token is none
    paper = FilteringConfig(overlong_fraction=0.2)
    assert overlong_penalty(16384 + 2048, 20480, paper) == pytest.approx(-0.5)


# --- in the driver


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    return make_demo(tmp_path_factory.mktemp("filtering") / "demo")


@pytest.fixture
def drivers():
    drivers = Drivers()
    yield drivers
    drivers.close()


def filtering_config(demo: Path, **filtering):
    """Rewards of a random model that differ in some groups: the answer is its last digit."""
    return configure(
        demo,
        reward={"kind": "exact", "answer_pattern": "([0-9])"},
        filtering={"drop_equal_groups": True, **filtering},
    )


def run_steps(handle, first: int, last: int) -> None:
    for step in range(first, last):
        handle.client.start(step, 0)
        assert handle.client.wait(step, 60)


def test_the_driver_refills_the_batch_and_counts_what_it_dropped(demo, drivers, tmp_path):
    handle = drivers.start(filtering_config(demo, max_rounds=40), tmp_path)
    handle.client.load_weights(demo / "w0", 0)
    run_steps(handle, 0, 3)
    total = drawn = 0
    for step in range(3):
        arrays, manifest = journal.load_step(tmp_path, step)
        rewards = arrays["rewards"].reshape(GROUPS, SAMPLES)
        assert (rewards.max(1) > rewards.min(1)).all()
        assert arrays["group_ids"].tolist() == [g for g in range(GROUPS) for _ in range(SAMPLES)]
        statistics = manifest["statistics"]
        assert statistics["filter/drawn_groups"] == GROUPS + statistics["filter/dropped_groups"]
        assert statistics["filter/filled_groups"] == 0
        drawn += statistics["filter/drawn_groups"]
        total += statistics["filter/dropped_groups"]
        assert statistics["filter/dropped_groups_total"] == total
        assert manifest["rollout_state_after"]["consumed"] == drawn
        assert manifest["rollout_state_after"]["filtered"]["dropped_groups"] == total
    assert total > 0


def test_counts_cursor_and_batches_survive_a_resume(demo, drivers, tmp_path):
    config = filtering_config(demo, max_rounds=6)
    whole = drivers.start(config, tmp_path / "whole")
    whole.client.load_weights(demo / "w0", 0)
    run_steps(whole, 0, 4)
    _, at_two = journal.load_step(tmp_path / "whole", 1)

    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    for step in (2, 3):
        shutil.rmtree(journal.step_directory(tmp_path / "part", step))
    resumed = drivers.start(config, tmp_path / "part")
    resumed.client.load_weights(demo / "w0", 0)
    resumed.client.restore(at_two["rollout_state_after"])
    assert resumed.client.hello()["rollout_state"] == at_two["rollout_state_after"]
    run_steps(resumed, 2, 4)
    for step in (2, 3):
        (expected, wanted), (found, manifest) = (journal.load_step(tmp_path / d, step) for d in ("whole", "part"))
        assert_equal(copy_of(found), copy_of(expected))
        assert manifest["rollout_state_after"] == wanted["rollout_state_after"]
        timings = ("generate_seconds", "verify_seconds")
        for name in manifest["statistics"].keys() - set(timings):
            assert manifest["statistics"][name] == wanted["statistics"][name], name

    replayed = drivers.start(config, tmp_path / "part")
    replayed.client.load_weights(demo / "w0", 0)
    replayed.client.restore(at_two["rollout_state_after"])
    assert replayed.client.start(2, 0) is True and replayed.client.wait(2, 60)
    state = journal.load_step(tmp_path / "whole", 2)[1]["rollout_state_after"]
    assert replayed.client.hello()["rollout_state"] == state


def test_long_responses_bear_the_penalty_after_the_groups_are_chosen(demo, drivers, tmp_path):
    plain = drivers.start(filtering_config(demo, max_rounds=40), tmp_path / "plain")
    penalised = drivers.start(filtering_config(demo, max_rounds=40, overlong_fraction=0.5), tmp_path / "penalised")
    for handle in (plain, penalised):
        handle.client.load_weights(demo / "w0", 0)
        run_steps(handle, 0, 1)
    arrays, manifest = journal.load_step(tmp_path / "penalised", 0)
    before, _ = journal.load_step(tmp_path / "plain", 0)
    np.testing.assert_array_equal(arrays["tokens"], before["tokens"])
    cu = np.cumsum(np.concatenate([[0], arrays["loss_mask"].astype(int)]))[arrays["cu_seqlens"]]
    expected = [-max(0, length - 6) / 6 for length in np.diff(cu)]  # of at most 12 tokens, the last 6
    np.testing.assert_allclose(arrays["rewards"] - before["rewards"], expected, atol=1e-6)
    statistics = manifest["statistics"]
    assert statistics["overlong_penalty"] == pytest.approx(np.mean(expected))
    assert statistics["overlong_rate"] == pytest.approx(np.mean(np.array(expected) < 0)) and min(expected) < 0
    assert statistics["reward"] == pytest.approx(arrays["rewards"].mean(), abs=1e-6)
    assert statistics["accuracy"] == pytest.approx((before["rewards"] > 0.5).mean())


def test_other_filtering_settings_are_no_replay(demo, drivers, tmp_path):
    for max_rounds, replayed in [(5, False), (5, True), (6, False)]:
        handle = drivers.start(filtering_config(demo, max_rounds=max_rounds), tmp_path)
        handle.client.load_weights(demo / "w0", 0)
        assert handle.client.start(0, 0) is replayed
        assert handle.client.wait(0, 60)
        handle.close()


# --- in the line of groups


def finished(rewards: list[float]) -> list[Scored]:
    completion = Completion(0, np.zeros(1, np.int32), np.zeros(1, np.float32), "stop", 0, 1.0)
    return [Scored(completion, "", Judgement(r, "ok", r)) for r in rewards]


def test_refused_groups_leave_with_the_batch_that_they_were_drawn_for():
    buffer = GroupBuffer(prompts_per_step=2, max_staleness=1)
    problem = Problem("p", "", "", np.zeros(1, np.int32))
    line = [Group(position, problem, {"consumed": position + 1}) for position in range(6)]
    buffer.add(line[:4])
    assert buffer.missing(0, 0) == 0
    line[1].responses, line[3].responses = finished(EQUAL), finished(MIXED)
    buffer.refuse(DROP)
    assert [g.kept for g in line[:4]] == [True, False, True, True] and buffer.missing(0, 0) == 1
    assert buffer.take_batch() is None  # the first group is not finished
    line[0].responses, line[2].responses = finished(EQUAL), finished(MIXED)
    buffer.refuse(DROP)
    assert buffer.missing(0, 0) == 2
    assert buffer.take_batch() == line[:4]
    buffer.add(line[4:])
    for group in line[4:]:
        group.responses = finished(MIXED)
    buffer.refuse(DROP)
    assert buffer.take_batch() == line[4:] and len(buffer) == 0


def test_batches_that_run_ahead_are_refilled_too(demo, drivers, tmp_path):
    config = configure(
        demo,
        reward={"kind": "exact", "answer_pattern": "([0-9])"},
        filtering={"drop_equal_groups": True, "max_rounds": 40},
        rollout={"max_staleness": 1},
    )
    handle = drivers.start(config, tmp_path)
    handle.client.load_weights(demo / "w0", 0)
    handle.client.start(0, 0)
    assert handle.client.wait(0, 60)
    handle.client.load_weights(demo / "w1", 1)
    handle.client.start(1, 1)
    assert handle.client.wait(1, 60)
    total = 0
    for step in range(2):
        arrays, manifest = journal.load_step(tmp_path, step)
        rewards = arrays["rewards"].reshape(GROUPS, SAMPLES)
        assert (rewards.max(1) > rewards.min(1)).all()
        assert arrays["versions"].min() >= step - 1
        total += manifest["statistics"]["filter/dropped_groups"]
        assert manifest["rollout_state_after"]["consumed"] == (step + 1) * GROUPS + total
    assert total > 0
