"""Sources in fixed proportions, pass rates and the curriculum, and that all of it survives a resume."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from asyppo_megatron.config import CurriculumConfig, DataConfig
from asyppo_megatron.rollout.curriculum import PassRates, acceptance, is_taken
from asyppo_megatron.rollout.dataset import Problem, Problems
from asyppo_megatron.rollout.mixture import PromptMixture, next_source


def problems(source: str, count: int) -> Problems:
    items = tuple(Problem(f"p{i}", "text", "1", np.zeros(1, np.int32), source=source) for i in range(count))
    return Problems(items, 0, f"fingerprint-{source}-{count}")


def data(curriculum: dict | None = None, **weights: float) -> DataConfig:
    sources = [{"name": name, "path": "x", "weight": weight} for name, weight in weights.items()]
    return DataConfig.model_validate({"sources": sources, "curriculum": curriculum or {}})


def mixture(config: DataConfig, seed: int = 3, **counts: int) -> PromptMixture:
    return PromptMixture({name: problems(name, count) for name, count in counts.items()}, config, seed)


def names(taken) -> list[str]:
    return [f"{p.source}/{p.id}" for p in taken]


def test_the_source_that_lags_most_is_next():
    assert [next_source([1, 1], t) for t in ([0, 0], [1, 0], [1, 1], [2, 1])] == [0, 1, 0, 1]
    taken = [0, 0]
    for _ in range(8):
        taken[next_source([3.0, 1.0], taken)] += 1
    assert taken == [6, 2]


def test_shares_are_exact_to_one_prompt_at_any_time():
    weights = {"a": 5.0, "b": 2.5, "c": 0.3}
    mix = mixture(data(**weights), a=7, b=100, c=2)
    counts: Counter[str] = Counter()
    total = sum(weights.values())
    for n in range(1, 400):
        counts[mix.take(1)[0].source] += 1
        assert all(abs(counts[name] - n * w / total) <= 1.0 + 1e-9 for name, w in weights.items())


def test_every_source_is_walked_like_a_file_of_its_own():
    mix = mixture(data(a=1.0, b=1.0), a=5, b=3)
    taken = [p for p in mix.take(30) if p.source == "a"]
    assert all(len({p.id for p in taken[i : i + 5]}) == 5 for i in range(0, 15, 5)), "each epoch visits each once"
    assert names(mixture(data(a=1.0, b=1.0), a=5, b=3).take(30)) == names(
        mixture(data(a=1.0, b=1.0), a=5, b=3).take(30)
    )
    other = mixture(data(a=1.0, b=1.0), seed=4, a=5, b=3).take(30)
    assert names(other) != names(mixture(data(a=1.0, b=1.0), a=5, b=3).take(30))


@pytest.mark.parametrize("enabled", [False, True])
def test_a_resumed_mixture_goes_on_as_if_nothing_had_happened(enabled):
    config = data({"enabled": enabled, "floor": 0.05, "memory": 8}, a=2.0, b=1.0)

    def walk(mix: PromptMixture, steps: range) -> list[str]:
        found = []
        for step in steps:
            taken = mix.take(6)
            passes = [(7 * step + i + len(p.id)) % 5 for i, p in enumerate(taken)]
            mix.record(taken, passes, [4] * 6)
            found += names(taken)
        return found

    whole = walk(mixture(config, a=9, b=11), range(30))
    first = mixture(config, a=9, b=11)
    head = walk(first, range(13))
    state = json.loads(json.dumps(first.state() | first.results()))
    second = mixture(config, a=9, b=11)
    second.take(5)
    second.restore(state)
    assert head + walk(second, range(13, 30)) == whole
    assert second.statistics() != first.statistics() and ("pass_rates" in state) == enabled


def test_a_state_of_other_sources_or_files_is_refused():
    state = mixture(data(a=1.0, b=1.0), a=5, b=3).state()
    with pytest.raises(ValueError, match=r"data.sources: got \['a'\], need \['a', 'b'\]"):
        mixture(data(a=1.0), a=5).restore(state)
    with pytest.raises(ValueError, match="got a dataset with fingerprint"):
        mixture(data(a=1.0, b=1.0), a=5, b=4).restore(state)
    with pytest.raises(ValueError, match=r"data.sources: got \['a'\], need data.train"):
        mixture(data(a=1.0), a=5).restore({"consumed": 3, "fingerprint": "x"})


def test_acceptance_favours_the_middle():
    found = acceptance(np.array([0, 1, 2, 3, 4, 0]), np.array([4, 4, 4, 4, 4, 0]), floor=0.1)
    np.testing.assert_allclose(found, [0.1, 0.1 + 0.9 * 0.75, 1.0, 0.1 + 0.9 * 0.75, 0.1, 1.0])
    assert acceptance(np.array([0, 4]), np.array([4, 4]), floor=1.0).tolist() == [1.0, 1.0]


def test_a_problem_is_taken_as_often_as_its_probability_says():
    for probability in (0.1, 0.6):
        taken = [is_taken(probability, seed=1, epoch=e, problem=p) for e in range(40) for p in range(100)]
        assert np.mean(taken) == pytest.approx(probability, abs=0.03)
        assert taken[:100] == [is_taken(probability, seed=1, epoch=0, problem=p) for p in range(100)]
    assert is_taken(1.0, seed=1, epoch=0, problem=0)


def test_pass_rates_fade_and_survive_as_text():
    rates = PassRates(100_000, memory=16)
    rates.record(7, 3, 4)
    assert (rates.passes[7], rates.tries[7]) == (3, 4)
    for _ in range(20):
        rates.record(7, 0, 8)
    assert rates.tries[7] == 16 and rates.passes[7] <= 1, "old successes fade"
    rates.record(99_999, 8, 8)
    text = rates.state()
    assert len(text) < 200, "only what was visited is kept"
    other = PassRates(100_000, memory=16)
    other.record(5, 1, 1)
    other.restore(text)
    assert (other.passes == rates.passes).all() and (other.tries == rates.tries).all()
    assert PassRates(3, 16).mean() == 0.0 and rates.mean() == pytest.approx((rates.passes[7] / 16 + 1.0) / 2)


def test_the_curriculum_passes_over_what_is_always_or_never_solved():
    mix = mixture(data({"enabled": True, "floor": 0.02}, a=1.0), a=30)
    seen: Counter[str] = Counter()
    for _ in range(300):
        taken = mix.take(4)
        seen.update(p.id for p in taken)
        # p0..p9 are never solved, p10..p19 always, the others half of the time.
        mix.record(taken, [0 if len(p.id) == 2 else 8 if p.id < "p20" else 4 for p in taken], [8] * 4)
    middle = sum(count for name, count in seen.items() if len(name) == 3 and name >= "p20")
    assert middle / 1200 > 0.85 and len(seen) == 30
    statistics = mix.statistics()
    assert statistics["source/a/prompts"] == 1200 and statistics["source/a/passed_over"] > 1000
    assert statistics["source/a/pass_rate"] == pytest.approx(0.5, abs=0.01)


def test_a_curriculum_over_nothing_but_solved_problems_still_goes_on():
    mix = mixture(data({"enabled": True, "floor": 1e-9}, a=1.0), a=4)
    first = mix.take(4)
    mix.record(first, [8] * 4, [8] * 4)
    assert len(mix.take(10)) == 10


def test_a_mixture_of_one_file_without_curriculum_is_that_file():
    assert not DataConfig(train="x").is_mixed
    assert DataConfig(train="x", curriculum=CurriculumConfig(enabled=True)).is_mixed
    assert [s.name for s in DataConfig(train="x").all_sources] == ["train"]
