"""The line of prompts: what is generated next, what is finished, and the batches that leave it for the journal."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from asyppo_megatron.backend import peak_memory_gb
from asyppo_megatron.config import Config
from asyppo_megatron.rollout import journal
from asyppo_megatron.rollout.buffer import Group, GroupBuffer
from asyppo_megatron.rollout.dataset import Problems
from asyppo_megatron.rollout.filtering import FilterCounts, count_groups, filter_statistics
from asyppo_megatron.rollout.generation import (
    penalised,
    sample_rows,
    staleness_statistics,
    step_statistics,
    step_trajectories,
)
from asyppo_megatron.rollout.problems import build_prompts
from asyppo_megatron.rollout.replay import StepIdentity
from asyppo_megatron.rollout.reward_statistics import passes_and_tries
from asyppo_megatron.rollout.scoring import ScoredResponses
from asyppo_megatron.types import Trajectory, pack_trajectories

log = logging.getLogger(__name__)


class BatchLine:
    """Groups from their prompts to the journal, in the order of their prompts. The driver's lock guards it.

    Args:
        problems: of every source.
        stop_token_ids: part of what a journalled step depends on.
        device: whose memory is reported.

    Attributes:
        next: the step whose batch leaves next; None before any was asked for.
        state: all that later batches depend on, or go on counting from, after the last batch that left.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        problems: Mapping[str, Problems],
        stop_token_ids: tuple[int, ...],
        device: torch.device,
    ):
        self._config, self._run_dir, self._device = config, run_dir, device
        self._skipped = sum(p.skipped for p in problems.values())
        self._cursor = build_prompts(config, problems)
        self._identity = StepIdentity(config, stop_token_ids)
        self._buffer = GroupBuffer(config.rollout.prompts_per_step, config.rollout.max_staleness, config.num_steps)
        self._filtered = FilterCounts()  # since the run began
        self.next: int | None = None
        self.state = self._whole_state()

    def restore(self, state: dict[str, Any]) -> None:
        """Continue the dataset where a checkpoint or a journalled step left it."""
        self._cursor.restore(state)
        self._filtered = FilterCounts(**state.get("filtered", {}))
        self.state = self._whole_state()
        self._buffer.clear()

    def _whole_state(self) -> dict[str, Any]:
        return self._cursor.state() | self._later_state()

    def _later_state(self) -> dict[str, Any]:
        """What a batch leaves behind beside the place in the dataset."""
        return self._cursor.results() | {"filtered": asdict(self._filtered)}

    def drop(self) -> None:
        """Forget what is in line: it is taken again."""
        self._buffer.clear()
        self._cursor.restore(self.state)

    def replay(self, wanted: int, policy_version: int) -> None:
        """Take complete steps from the journal, as long as nothing is in line before them."""
        assert self.next is not None
        while self.next <= wanted + self._config.rollout.max_staleness and not len(self._buffer):
            manifest = self._identity.find(self._run_dir, self.next, policy_version, self.state)
            if manifest is None:
                return
            self.restore(manifest["rollout_state_after"])
            self.next += 1

    def missing(self, wanted: int) -> int:
        """Groups that may be started now, the bound on staleness being what it is."""
        assert self.next is not None
        return self._buffer.missing(self.next, wanted)

    def take(self, count: int) -> list[Group]:
        """The next prompts, in line from now on."""
        groups = [self._take_group() for _ in range(count)]
        self._buffer.add(groups)
        return groups

    def _take_group(self) -> Group:
        position = self._cursor.state()["consumed"]
        (problem,) = self._cursor.take(1)
        return Group(position, problem, self._cursor.state())

    def accept(self, groups: Sequence[Group], scores: ScoredResponses, wave: int) -> None:
        """The one place where finished groups enter the line of batches."""
        size = self._config.rollout.responses_per_prompt
        for number, group in enumerate(groups):
            group.wave, group.generate_s, group.verify_s = wave, scores.generate_s, scores.verify_s
            group.responses = scores.responses[number * size : (number + 1) * size]
        self._buffer.refuse(self._config.filtering)

    def journal_batch(self, engine_statistics: Callable[[], dict[str, float]]) -> int | None:
        """Write the next batch if it is complete; its step."""
        line = self._buffer.take_batch()
        if line is None:
            return None
        assert self.next is not None
        step, groups = self.next, [g for g in line if g.kept]
        trajectories = step_trajectories(groups)
        # Refused groups too: what is known of a problem does not depend on whether it is trained on.
        self._cursor.record([g.problem for g in line], *passes_and_tries([g.responses for g in line]))
        statistics = step_statistics(trajectories, groups) | engine_statistics() | self._cursor.statistics()
        trajectories, changes = self._filter(line, trajectories)
        statistics |= changes
        if self._config.rollout.max_staleness:
            statistics |= staleness_statistics(trajectories, step)
        after = line[-1].state_after | self._later_state()
        journal.write_step(
            self._run_dir,
            pack_trajectories(trajectories, step),
            {
                **self._identity.of(step, min(t.policy_version for t in trajectories), self.state),
                "rollout_state_after": after,
                "statistics": statistics,
                "memory_gb": peak_memory_gb(self._device),
                "problems": [g.problem.id for g in groups],
            },
            sample_rows(groups, trajectories, journal.SAMPLES_SHOWN),
        )
        log.info("step %d: %s", step, json.dumps(statistics))
        self.state = after
        self.next += 1
        return step

    def _filter(
        self, line: Sequence[Group], trajectories: list[Trajectory]
    ) -> tuple[list[Trajectory], dict[str, float]]:
        """Trajectories with the penalty on length, and what the filter and the dataset left out."""
        config = self._config.filtering
        trajectories, statistics = penalised(trajectories, self._config.rollout.max_response_tokens, config)
        statistics["skipped_prompts"] = self._skipped
        if config.drop_equal_groups:
            rounds = len({group.wave for group in line})
            counts = count_groups([group.rewards for group in line], [group.kept for group in line], rounds)
            self._filtered += counts
            statistics |= filter_statistics(counts, self._filtered)
        return trajectories, statistics
