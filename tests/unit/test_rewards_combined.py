"""Several weighted rewards of one response: summed, placed, and kept apart in the log; hostile mathematics."""

from __future__ import annotations

import time

import numpy as np
import pytest

from asyppo_megatron.config import RewardConfig, build_config
from asyppo_megatron.config.load import ConfigError
from asyppo_megatron.demo.prepare import build_tokenizer
from asyppo_megatron.rewards import ExactMatch, Judgement, MathVerifier, RewardSet, Sample, Verdict
from asyppo_megatron.rollout.dataset import Problem
from asyppo_megatron.rollout.engine import Completion
from asyppo_megatron.rollout.reward_statistics import passes_and_tries, reward_statistics
from asyppo_megatron.rollout.scoring import Scored


class LastDigits:
    """A real reward of pieces: the last digit of each, NaN-free; of the whole, its length."""

    def score_many(self, samples):
        found = []
        for s in samples:
            if s.pieces:
                values = tuple(float(p[-1]) if p[-1:].isdigit() else 0.0 for p in s.pieces)
                found.append(Verdict(sum(values), "ok", values))
            else:
                found.append(Verdict(0.0, "function_error") if "?" in s.text else Verdict(len(s.text)))
        return found

    def close(self):
        pass


def reward_set() -> RewardSet:
    exact = RewardConfig(name="exact", kind="exact", weight=2.0)
    whole = RewardConfig(name="whole", kind="function", function="m:f", weight=0.5)
    step = RewardConfig(name="step", kind="function", function="m:f", per="step", step_separator=";", weight=10.0)
    token = RewardConfig(name="token", kind="function", function="m:f", per="token", weight=-1.0)
    verifiers = [
        (exact, ExactMatch(exact.answer_pattern, exact.timeout_s)),
        *((c, LastDigits()) for c in (whole, step, token)),
    ]
    return RewardSet(verifiers, build_tokenizer())


def sample(text: str, answer: str) -> Sample:
    tokens = build_tokenizer()(text)["input_ids"]
    return Sample(text.removesuffix("$"), answer, response_tokens=tuple(tokens))


def test_rewards_are_weighted_summed_and_placed():
    rewards = reward_set()
    text = "1+2=3;#3$"
    chosen = [("exact", "whole"), ("exact",), ("step", "exact"), ("token",), ()]
    found = rewards.judge([sample(text, "3")] * 5, chosen)
    rewards.close()
    assert [j.reward for j in found] == [2.0 + 4.0, 2.0, 2.0, 0.0, 6.0]
    assert [j.primary for j in found] == [1.0, 1.0, 6.0, 1 + 2 + 3 + 3, 1.0]
    assert found[0].token_rewards is None and found[0].scores == {"exact": 1.0, "whole": 8.0}
    # Steps "1+2=3" and "#3": the last token of each; "$" is no part of a step.
    assert found[2].token_rewards.tolist() == [0, 0, 0, 0, 30, 0, 0, 30, 0]
    assert found[3].token_rewards.tolist() == [-1, 0, -2, 0, -3, 0, 0, -3, 0]
    assert found[4].token_rewards.tolist() == [-1, 0, -2, 0, 27, 0, 0, 27, 0]
    assert found[4].token_rewards.dtype == np.float32


def test_a_response_without_steps_has_dense_rewards_of_zero():
    rewards = reward_set()
    (empty,) = rewards.judge([sample("$", "3")], [("step", "exact")])
    rewards.close()
    assert empty.token_rewards.tolist() == [0.0] and (empty.reward, empty.status) == (0.0, "ok")


def test_statuses_are_kept_apart():
    rewards = reward_set()
    (found,) = rewards.judge([sample("#3?$", "3")], [("exact", "whole", "step")])
    rewards.close()
    assert found.status == "function_error"
    assert found.statuses == {"exact": "ok", "whole": "function_error", "step": "ok"}


def scored(reward: float, primary: float, scores: dict, dense=None, **statuses) -> Scored:
    completion = Completion(0, np.zeros(2, np.int32), np.zeros(2, np.float32), "stop", 1.0, 0)
    causes = dict.fromkeys(scores, "ok") | statuses
    return Scored(completion, "", Judgement(reward, "ok", primary, dense, scores, causes))


def test_every_reward_and_source_is_logged_apart():
    a, b = (Problem(n, "", "", np.zeros(1, np.int32), source=n) for n in ("a", "b"))
    responses = [
        scored(1.5, 1.0, {"x": 1.0, "y": 1.0}),
        scored(0.0, 0.0, {"x": 0.0, "y": 0.0}, y="code_timeout"),
        scored(3.0, 0.75, {"y": 0.75}, np.array([0.5, 0.0], np.float32)),
        scored(1.0, 0.25, {"y": 0.25}, np.array([0.0, 0.0], np.float32)),
    ]
    found = reward_statistics(responses, [a, a, b, b])
    assert found == pytest.approx(
        {
            "reward/x/mean": 0.5,
            "reward/x/std": 0.5,
            "reward/x/count": 2,
            "reward/y/mean": 0.5,
            "reward/y/std": float(np.std([1, 0, 0.75, 0.25])),
            "reward/y/count": 4,
            "reward/y/code_timeout": 1,
            "reward/dense": 0.25,
            "reward/dense_tokens": 0.5,
            "source/a/responses": 2,
            "source/a/reward": 0.75,
            "source/a/accuracy": 0.5,
            "source/b/responses": 2,
            "source/b/reward": 2.0,
            "source/b/accuracy": 0.5,
        }
    )
    assert reward_statistics(responses[:1], [a])["reward/x/mean"] == 1.0
    assert reward_statistics([scored(1.0, 1.0, {"x": 1.0})], [a]) == {}, "one reward is logged as ever"
    assert passes_and_tries([responses[:2], responses[2:]]) == ([1, 1], [2, 2])


def tree(**sections) -> dict:
    return {"actor": {"model": "a"}, "critics": [{"model": "c"}] * 2, "data": {"train": "t"}, **sections}


def function(name: str, **more) -> dict:
    return {"name": name, "kind": "function", "function": "m:f", **more}


@pytest.mark.parametrize(
    ("sections", "error"),
    [
        ({"reward": {"kind": "exact"}, "rewards": [{"kind": "math"}]}, "reward: got it beside rewards"),
        ({"rewards": [{"kind": "math"}, {"kind": "math"}]}, "rewards: got names ['math', 'math'], need distinct ones"),
        ({"reward": {"kind": "math", "per": "step"}}, "reward.per: got step with kind math, need response"),
        ({"rewards": [function("a", function="m.f")]}, "rewards.0.function: got 'm.f', need package.module:function"),
        ({"reward": {"function": "m:f"}}, "reward.function: got 'm:f' with kind math, need kind function"),
        ({"reward": {"kind": "model"}}, "reward.model.url: got '', need http://host:port"),
        (
            {"reward": {"kind": "model", "per": "token", "model": {"url": "http://h:1"}}},
            "reward.per: got token with model.api sglang",
        ),
        ({"reward": function("a", step_separator="(")}, "reward.step_separator: got '(', which is no regular"),
        ({"reward": function("a", step_separator="x*")}, "reward.step_separator: got 'x*', which matches nothing"),
        ({"reward": function("a b")}, "reward.name: got 'a b', need letters"),
        ({"data": {}}, "data: got neither of train and sources"),
        (
            {"data": {"train": "t", "sources": [{"name": "a", "path": "p"}]}},
            "data: got both of train and sources, need one",
        ),
        (
            {"data": {"sources": [{"name": "a", "path": "p"}, {"name": "a", "path": "q"}]}},
            "data.sources: got names ['a', 'a'], need distinct ones",
        ),
        (
            {"data": {"sources": [{"name": "a", "path": "p", "rewards": ["code"]}]}},
            "data.sources.0.rewards: got ['code'], need some of ['math']",
        ),
        (
            {"data": {"train": "t", "eval": [{"name": "e", "path": "p", "rewards": ["math", "math"]}]}},
            "data.eval.0.rewards: got ['math', 'math'], need each name once",
        ),
    ],
)
def test_contradictions_are_refused(sections, error):
    with pytest.raises(ConfigError) as caught:
        build_config(tree(**sections))
    assert len(caught.value.errors) == 1 and caught.value.errors[0].startswith(error), caught.value.errors


def test_hostile_mathematics_scores_zero_within_its_time():
    verifier = MathVerifier(workers=2, timeout_s=2.0, memory_gb=1.0)
    texts = [
        r"\boxed{" + "9^{" * 300 + "9" + "}" * 300 + "}",
        r"\boxed{10^{10^{10^{10}}}}",
        r"\boxed{(((1+1)^{99999})^{99999})^{99999}}",
        r"\boxed{" + r"\frac{1}{" * 500 + "2" + "}" * 500 + "}",
        r"\boxed{" + r"\sqrt{" * 400 + "2" + "}" * 400 + "}",
        r"\boxed{\sum_{n=1}^{10^{12}} \frac{1}{n^n}}",
        r"\boxed{\int_0^{\infty} x^{x^{x^x}} dx}",
        r"\boxed{" + "+".join(f"x_{{{i}}}^{{{i}}}" for i in range(150)) + "}",
        "\\boxed{" * 100_000,
        "x" * 8_000_000,
        "\\boxed{" + "[" * 4_000_000,
        "\u202e\u0000" * 1_000_000 + r"\boxed{\text{\unicode{}}}",
        r"\boxed{\lambda x. __import__('os').system('touch /tmp/asyppo-math-owned')}",
    ]
    start = time.monotonic()
    try:
        *bad, good = verifier.score_many([*((t, "5") for t in texts), (r"\boxed{5}", "5")])
    finally:
        verifier.close()
    assert good == Verdict(1.0) and all(v.reward == 0.0 for v in bad), bad
    assert {v.status for v in bad} <= {"ok", "verifier_error", "verifier_timeout"}
    assert time.monotonic() - start < 120
    import os

    assert not os.path.exists("/tmp/asyppo-math-owned")
