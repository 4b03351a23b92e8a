"""The buffer between generation and training: groups in the order of their prompts, and how far ahead they may be.

A batch is made of the next prompts in line and waits for all of their responses: whether a response is short or long
never decides whether it is trained on. What runs ahead is bounded at the start: the prompts of step s are not started
before weights of version s - max_staleness, so nothing of the batch can be staler than that, whatever it is carried
over. And since groups leave in the order in which their prompts were taken, the position of the first group in line
is the whole state of the buffer: a resumed run starts again from there, loses no prompt and repeats none.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from asyppo_megatron.config import FilteringConfig
from asyppo_megatron.rollout.dataset import Problem
from asyppo_megatron.rollout.filtering import kept_groups
from asyppo_megatron.rollout.scoring import Scored


@dataclass
class Group:
    """All responses to one prompt.

    Attributes:
        position: of the prompt in the run's walk over the dataset.
        problem: the prompt.
        state_after: of the dataset, once this prompt was taken.
        responses: one a sample; empty until all are finished.
        kept: false where the group was finished and then refused: it takes no place in a batch.
        generate_s, verify_s: seconds of the generation that it was part of.
        wave: number of that generation.
    """

    position: int
    problem: Problem
    state_after: dict[str, Any]
    responses: list[Scored] = field(default_factory=list)
    kept: bool = True
    generate_s: float = 0.0
    verify_s: float = 0.0
    wave: int = 0

    @property
    def is_finished(self) -> bool:
        return bool(self.responses)

    @property
    def rewards(self) -> list[float]:
        """Of its responses, as they were scored."""
        return [r.verdict.total for r in self.responses]


class GroupBuffer:
    """Groups in line for the next steps; the driver's lock guards it.

    Args:
        prompts_per_step: groups of a batch.
        max_staleness: batches that may be generated ahead of the one that is trained on.
        num_steps: of the run; nothing is generated for later ones.
    """

    def __init__(self, prompts_per_step: int, max_staleness: int, num_steps: int = sys.maxsize):
        self._size, self._ahead, self._num_steps = prompts_per_step, max_staleness, num_steps
        self._line: deque[Group] = deque()

    def __len__(self) -> int:
        return len(self._line)

    def missing(self, next_step: int, wanted_step: int) -> int:
        """Groups that may be started now.

        Args:
            next_step: whose batch leaves the buffer next.
            wanted_step: that the ranks train on with the current weights; those of later steps run ahead.
        """
        end = min(wanted_step + self._ahead + 1, max(self._num_steps, wanted_step + 1))
        places = max(end - next_step, 0) * self._size
        return max(places - sum(group.kept for group in self._line), 0)

    def add(self, groups: Sequence[Group]) -> None:
        self._line.extend(groups)

    def refuse(self, config: FilteringConfig) -> None:
        """Have the finished groups that the filter drops take no place."""
        rewards = [group.rewards if group.is_finished else None for group in self._line]
        for group, kept in zip(self._line, kept_groups(rewards, self._size, config), strict=True):
            group.kept = kept

    def take_batch(self) -> list[Group] | None:
        """The groups of the next batch and the refused ones between them, or None while one is unfinished."""
        kept = 0
        for count, group in enumerate(self._line, start=1):
            if not group.is_finished:
                return None
            kept += group.kept
            if kept == self._size:
                return [self._line.popleft() for _ in range(count)]
        return None

    def clear(self) -> int:
        """Forget everything; the number of groups that were in line."""
        count = len(self._line)
        self._line.clear()
        return count
