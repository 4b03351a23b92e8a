"""Rewards by import path: synchronous and asynchronous, and what a bad one costs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from asyppo_megatron.config import RewardConfig
from asyppo_megatron.rewards import FunctionReward, Sample, Verdict


@pytest.fixture(autouse=True, scope="module")
def import_path():
    """The workers find this folder as they find a user's: through PYTHONPATH."""
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
    yield
    patch.undo()


def build(name: str, **more) -> FunctionReward:
    settings = {"kind": "function", "workers": 2, "timeout_s": 10.0, "function": f"reward_functions:{name}"}
    return FunctionReward(RewardConfig.model_validate(settings | more))


def scored(name: str, samples: list[Sample], **more) -> list[Verdict]:
    reward = build(name, **more)
    try:
        return reward.score_many(samples)
    finally:
        reward.close()


def test_a_function_sees_response_answer_problem_and_the_other_keys_of_the_row():
    samples = [Sample("four", "yes", "p"), Sample("", "no", "p", {"bonus": -2, "tests": [1]})]
    assert scored("length", samples) == [Verdict(4.5), Verdict(-2.0)]


def test_a_coroutine_is_awaited_under_the_same_deadline():
    samples = [Sample("0.25", "0.01"), Sample("1", "1000"), Sample("0.75", "0")]
    found = scored("slow_echo", samples, timeout_s=2.0)
    assert found == [Verdict(0.25), Verdict(0.0, "function_timeout"), Verdict(0.75)]


def test_steps_and_tokens_get_one_value_each():
    sample = Sample("a 1\n\nb", "", pieces=("a 1", "b"), ends=(2, 5))
    assert scored("steps_with_digits", [sample, Sample("", "")], per="step") == [
        Verdict(1.0, "ok", (1.0, 0.0)),
        Verdict(0.0),
    ]
    tokens = Sample("abc", "", pieces=("a", "bc", ""), ends=(0, 1, 2))
    assert scored("token_lengths", [tokens], per="token") == [Verdict(3.0, "ok", (1.0, 2.0, 0.0))]
    assert scored("length", [sample._replace(pieces=())], per="step") == [Verdict(0.0, "function_error")]


def test_what_a_function_does_wrong_scores_zero_by_cause_and_the_next_call_is_right():
    names = ["raise", "hang", "die", "nan", "text", "none", "memory", "exit", "good"]
    found = scored("misbehaves", [Sample(n, "") for n in names], timeout_s=1.5)
    causes = ["function_error", "function_timeout", "function_error", *["function_value"] * 3, "function_error"]
    assert [v.status for v in found[:7]] == causes and [v.reward for v in found[:8]] == [0.0] * 8
    assert found[7].status == "function_error" and found[8] == Verdict(1.0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "reward.function: got 'reward_functions:missing', which cannot be used: AttributeError"),
        ("not_a_function", "not_a_function is int, need a function"),
    ],
)
def test_a_function_that_cannot_be_used_is_refused_before_the_run(name, message):
    with pytest.raises(ValueError, match=message):
        build(name)
    with pytest.raises(ValueError, match="ModuleNotFoundError"):
        FunctionReward(RewardConfig(kind="function", workers=1, function="no_such_module:f"))


def test_the_current_directory_is_searched(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("def one(**_):\n    return 1\n")
    monkeypatch.chdir(tmp_path)
    reward = FunctionReward(RewardConfig(kind="function", workers=1, function="my_rewards:one"))
    try:
        assert reward.score_many([Sample("", "")]) == [Verdict(1.0)]
        assert "my_rewards" not in sys.modules, "it runs in its own process only"
    finally:
        reward.close()
