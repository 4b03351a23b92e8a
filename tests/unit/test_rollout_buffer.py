"""The line of groups between generation and training: order, room, and what a bound on staleness allows."""

from __future__ import annotations

import numpy as np
import pytest

from asyppo_megatron.rollout.buffer import Group, GroupBuffer
from asyppo_megatron.rollout.dataset import Problem

SIZE = 2  # groups of a batch


def groups(first: int, count: int) -> list[Group]:
    problem = Problem("p", "text", "answer", np.array([1], dtype=np.int32))
    return [Group(n, problem, {"consumed": n + 1}) for n in range(first, first + count)]


def finish(group: Group, kept: bool = True) -> None:
    group.responses, group.kept = ["a response"], kept


@pytest.mark.parametrize(
    ("ahead", "next_step", "wanted", "expected"),
    [
        (0, 0, 0, 2),  # synchronous: the batch that is wanted
        (1, 0, 0, 4),  # and one ahead
        (3, 5, 5, 8),
        (1, 6, 5, 2),  # step 5 has left already: one batch may run ahead of the weights of step 5
        (0, 6, 5, 0),
        (1, 7, 5, 0),
    ],
)
def test_so_many_groups_may_be_started(ahead, next_step, wanted, expected):
    assert GroupBuffer(SIZE, ahead).missing(next_step, wanted) == expected


def test_nothing_is_generated_for_steps_after_the_last():
    buffer = GroupBuffer(SIZE, 3, num_steps=6)
    assert buffer.missing(4, 4) == 2 * SIZE and buffer.missing(5, 5) == SIZE and buffer.missing(6, 5) == 0


def test_what_is_in_line_is_not_missing_but_what_was_refused_is():
    buffer = GroupBuffer(SIZE, 1)
    line = groups(0, 3)
    buffer.add(line)
    assert buffer.missing(0, 0) == 1
    finish(line[0], kept=False)
    assert buffer.missing(0, 0) == 2


def test_a_batch_waits_for_the_first_prompts_however_many_later_ones_are_finished():
    buffer = GroupBuffer(SIZE, 2)
    line = groups(0, 6)
    buffer.add(line)
    for group in line[1:]:
        finish(group)
    assert buffer.take_batch() is None, "the first response is long: the batch waits for it"
    finish(line[0])
    assert [g.position for g in buffer.take_batch()] == [0, 1]
    assert [g.position for g in buffer.take_batch()] == [2, 3]
    assert len(buffer) == 2


def test_refused_groups_leave_with_the_batch_that_they_were_passed_over_for():
    buffer = GroupBuffer(SIZE, 0)
    line = groups(0, 5)
    buffer.add(line)
    for group, kept in zip(line, (False, True, False, True, True), strict=True):
        finish(group, kept)
    taken = buffer.take_batch()
    assert [(g.position, g.kept) for g in taken] == [(0, False), (1, True), (2, False), (3, True)]
    assert taken[-1].state_after == {"consumed": 4}, "a resumed run goes on with the prompt after these"
    assert buffer.take_batch() is None
