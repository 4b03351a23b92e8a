"""Prompts from several sources in fixed proportions, with or without a curriculum; the order survives a resume."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from asyppo_megatron.config import CurriculumConfig, DataConfig
from asyppo_megatron.rollout.curriculum import PassRates, acceptance, is_taken
from asyppo_megatron.rollout.dataset import Problem, Problems, PromptCursor


def next_source(weights: Sequence[float], taken: Sequence[int]) -> int:
    """The source that lags its share most, the first of equals; so shares are exact to one prompt at any time.

    Args:
        weights: of each source, positive.
        taken: prompts taken from each so far.
    """
    following = sum(taken) + 1
    total = sum(weights)
    lags = [w / total * following - t for w, t in zip(weights, taken, strict=True)]
    return max(range(len(lags)), key=lambda i: (lags[i], -i))


class SourceCursor:
    """The walk over one source; with a curriculum it passes over problems that are always or never solved."""

    def __init__(self, problems: Problems, seed: int, shuffle: bool, curriculum: CurriculumConfig):
        self._problems, self._seed, self._curriculum = problems, seed, curriculum
        self._cursor = PromptCursor(problems, seed, shuffle)
        self._rates = PassRates(len(problems.items), curriculum.memory)
        self._index = {p.id: i for i, p in enumerate(problems.items)}
        self.taken = self.passed_over = 0

    def take(self) -> Problem:
        """The next problem, the walk's own or the next one that the curriculum lets through."""
        count = len(self._problems.items)
        for turn in range(count + 1):
            position = self._cursor.position
            (problem,) = self._cursor.take(1)
            index = self._index[problem.id]
            # A whole epoch was passed over: the run must go on, with whatever comes.
            if turn == count or self._is_taken(index, position // count):
                break
            self.passed_over += 1
        self.taken += 1
        return problem

    def _is_taken(self, index: int, epoch: int) -> bool:
        if not self._curriculum.enabled:
            return True
        at = slice(index, index + 1)
        probability = acceptance(self._rates.passes[at], self._rates.tries[at], self._curriculum.floor)[0]
        return is_taken(float(probability), seed=self._seed, epoch=epoch, problem=index)

    def record(self, problem: Problem, passes: int, tries: int) -> None:
        if self._curriculum.enabled:
            self._rates.record(self._index[problem.id], passes, tries)

    def statistics(self) -> dict[str, float]:
        found: dict[str, float] = {"prompts": self.taken}
        if self._curriculum.enabled:
            found |= {"passed_over": self.passed_over, "pass_rate": self._rates.mean()}
        return found

    def state(self) -> dict[str, Any]:
        return self._cursor.state() | {"taken": self.taken, "passed_over": self.passed_over}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._cursor.restore(dict(state))
        self.taken, self.passed_over = int(state["taken"]), int(state["passed_over"])

    def pass_rates(self) -> str:
        return self._rates.state()

    def restore_pass_rates(self, state: str | None) -> None:
        """None: nothing is known."""
        if state is None:
            self._rates = PassRates(len(self._problems.items), self._curriculum.memory)
        else:
            self._rates.restore(state)


class PromptMixture:
    """What `PromptCursor` is for one file, for several sources: each prompt from the source that lags most.

    Args:
        sources: problems of each source by its name.
        config: weights and curriculum.
        seed: of the run.
    """

    def __init__(self, sources: Mapping[str, Problems], config: DataConfig, seed: int):
        self._weights = [s.weight for s in config.all_sources]
        self._has_curriculum = config.curriculum.enabled
        self._cursors = {
            name: SourceCursor(problems, seed, config.shuffle, config.curriculum) for name, problems in sources.items()
        }

    def take(self, count: int) -> list[Problem]:
        """The next `count` problems."""
        cursors = list(self._cursors.values())
        return [cursors[next_source(self._weights, [c.taken for c in cursors])].take() for _ in range(count)]

    def record(self, problems: Sequence[Problem], passes: Sequence[int], tries: Sequence[int]) -> None:
        """Results of problems that `take` gave out: correct and all responses of each."""
        for problem, right, total in zip(problems, passes, tries, strict=True):
            self._cursors[problem.source].record(problem, right, total)

    def statistics(self) -> dict[str, float]:
        """By source, for the log: prompts so far, and what the curriculum did."""
        return {
            f"source/{name}/{key}": value
            for name, cursor in self._cursors.items()
            for key, value in cursor.statistics().items()
        }

    def state(self) -> dict[str, Any]:
        """Where the walk is, small enough to keep for every prompt under way."""
        states = {name: cursor.state() for name, cursor in self._cursors.items()}
        return {"consumed": sum(c.taken for c in self._cursors.values()), "sources": states}

    def results(self) -> dict[str, Any]:
        """What was learned from results, the other half of the state; some kilobytes with a curriculum."""
        if not self._has_curriculum:
            return {}
        return {"pass_rates": {name: cursor.pass_rates() for name, cursor in self._cursors.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state (and the results, where it has them).

        Raises:
            ValueError: the state is of other sources or files.
        """
        found = list(state.get("sources", {}))
        if found != list(self._cursors):
            raise ValueError(
                f"data.sources: got {list(self._cursors)}, need {found or 'data.train'} (those of the checkpoint); "
                "restore them, or start in a new run_dir"
            )
        for name, cursor in self._cursors.items():
            cursor.restore(state["sources"][name])
            if self._has_curriculum:
                cursor.restore_pass_rates(state.get("pass_rates", {}).get(name))
