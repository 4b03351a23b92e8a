"""One key for a method: the defaults it brings, the critics it takes, and what contradicts it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from asyppo_megatron.config import Config, ConfigError, build_config, dump_config, load_config
from asyppo_megatron.config.methods import METHODS, pretraining

ROOT = Path(__file__).resolve().parents[2]
DEMO = [ROOT / "model_configs/runs/demo.yaml", ROOT / "model_configs/runs/demo_methods.yaml"]
WITHOUT_CRITICS = ["grpo", "dr_grpo", "rloo", "dapo", "gspo", "cispo", "aspo", "asympo", "spo"]
NAMED = [m for m in METHODS if m != "custom"]


def tree(**sections: Any) -> dict[str, Any]:
    critics = [{"model": "c", "ranks": 1}, {"model": "c", "ranks": 2}]
    return {"actor": {"model": "a"}, "critics": critics, "data": {"train": "t.jsonl"}, **sections}


def errors_of(**sections: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        build_config(tree(**sections))
    return caught.value.errors


def test_every_name_that_the_key_may_have_is_a_method():
    assert set(Config.model_fields["method"].annotation.__args__) == set(METHODS)


@pytest.mark.parametrize("path", DEMO, ids=lambda p: p.stem)
@pytest.mark.parametrize("method", NAMED)
def test_the_demo_runs_every_method_with_only_its_key_changed(method: str, path: Path):
    config = load_config(path, [f"method={method}"])
    assert config.method == method
    if method in WITHOUT_CRITICS:
        assert config.critics == () and list(config.roles()) == ["actor"] and config.num_ranks == 2
        assert config.ppo.advantage != "gae" and config.ppo.advantage_mask_fraction == 0
    else:
        expected = 2 if method in ("asyppo", "naive_ensemble") else 1
        assert config.num_critics == expected and config.num_ranks == 2 + expected


@pytest.mark.parametrize("method", NAMED)
def test_the_resolved_configuration_shows_a_methods_defaults_and_reads_back_equal(method: str, tmp_path: Path):
    config = build_config(tree(method=method))
    text = dump_config(config)
    for key, value in METHODS[method][1]["ppo"].items():
        assert f"{key}: {value}" in text.lower() or f"{key}: {value}" in text
    (tmp_path / "c.yaml").write_text(text)
    assert load_config(tmp_path / "c.yaml") == config


def test_the_papers_numbers():
    dapo, gspo, cispo = (build_config(tree(method=m)) for m in ("dapo", "gspo", "cispo"))
    assert (dapo.ppo.clip_low, dapo.ppo.clip_high, dapo.ppo.aggregation) == (0.2, 0.28, "token-mean")
    assert dapo.filtering.drop_equal_groups and dapo.filtering.overlong_fraction == 0.2
    assert (gspo.ppo.clip_low, gspo.ppo.clip_high) == (3e-4, 4e-4)
    assert cispo.ppo.clip_low == 1.0
    vapo = build_config(tree(method="vapo")).ppo
    assert (vapo.critic_lam, vapo.length_adaptive_alpha, vapo.positive_nll_coef) == (1.0, 0.05, 0.1)
    assert vapo.critic_warmup_steps == 50 and vapo.order == "values_first" and vapo.clip_high == 0.28
    aspo = build_config(tree(method="aspo")).ppo
    assert (aspo.clip_low, aspo.clip_high, aspo.high_entropy_clip, aspo.high_entropy_fraction) == (0.2, 0.2, 0.4, 0.2)
    assert build_config(tree(method="naive_ensemble")).ppo.critic_data == "shared"
    assert build_config(tree()) == build_config(tree(method="asyppo"))


def test_explicit_keys_stand_over_a_methods_defaults():
    config = build_config(tree(method="dapo", ppo={"clip_high": 0.3}, filtering={"drop_equal_groups": False}))
    assert config.ppo.clip_high == 0.3 and config.ppo.clip_low == 0.2
    assert not config.filtering.drop_equal_groups and config.filtering.overlong_fraction == 0.2


def test_a_methods_defaults_are_not_changed_by_a_configuration():
    build_config(tree(method="grpo", ppo={"clip_low": 0.1}))
    assert "clip_low" not in METHODS["grpo"][1]["ppo"]
    assert build_config(tree(method="grpo")).ppo.clip_low == 0.2


@pytest.mark.parametrize(
    ("sections", "error"),
    [
        (
            {"method": "grpo", "ppo": {"advantage": "rloo"}},
            "ppo.advantage: got rloo with method grpo, need grpo; leave it out, or choose another method (custom "
            "defines nothing)",
        ),
        (
            {"method": "asyppo", "ppo": {"critic_data": "shared"}},
            "ppo.critic_data: got shared with method asyppo, need disjoint; leave it out, or choose another method "
            "(custom defines nothing)",
        ),
        (
            {"method": "grpo", "critics_used": 2},
            "critics_used: got 2 with method grpo, which uses none; leave it out",
        ),
        ({"method": "ppo", "critics_used": 2}, "critics_used: got 2 with method ppo, which uses 1; leave it out"),
        ({"critics_used": 3}, "critics_used: got 3, need at most the 2 critic(s) listed; add critics"),
        ({"method": "vapo", "critics": []}, "critics: got none with method vapo, need 1; add a critic"),
        (
            {"method": "grpo", "ppo": {"advantage_mask_fraction": 0.2}},
            "ppo: got masks (advantage 0.2, entropy 0.0) with 0 critic(s), need >= 2 to disagree; add a critic or set "
            "both fractions to 0",
        ),
        (
            {"method": "rloo", "ppo": {"critic_warmup_steps": 3}},
            "ppo.critic_warmup_steps: got 3 without critics, which it is about; leave it out or add critics",
        ),
        (
            {"ppo": {"critic_lam": 0.9}},
            "ppo.critic_lam: got 0.9 with ppo.order critics_first, whose target is the Monte-Carlo return (lambda 1); "
            "set ppo.order values_first or leave it out",
        ),
        (
            {"method": "asympo", "ppo": {"importance": "truncated"}},
            "ppo.importance: got truncated with ppo.loss asympo, which has no use for it; leave it out or change the "
            "loss",
        ),
        (
            {"method": "gspo", "ppo": {"high_entropy_clip": 0.4}},
            "ppo.high_entropy_clip: got 0.4 with ppo.loss gspo, which has no use for it; leave it out or change the "
            "loss",
        ),
        (
            {"method": "cispo", "ppo": {"dual_clip": 3.0}},
            "ppo.dual_clip: got 3.0 with ppo.loss cispo, which has no use for it; leave it out or change the loss",
        ),
        (
            {"method": "ppo", "filtering": {"drop_equal_groups": True}, "rollout": {"responses_per_prompt": 1}},
            "rollout.responses_per_prompt: got 1 with filtering.drop_equal_groups, need >= 2 to differ",
        ),
    ],
)
def test_what_contradicts_a_method_is_refused(sections: dict[str, Any], error: str):
    assert errors_of(**sections) == [error]


def test_an_unknown_method_is_named_with_those_there_are():
    (error,) = errors_of(method="trpo")
    assert error.startswith("method: Input should be 'asyppo', 'ppo'") and error.endswith("(got 'trpo')")


def test_an_unused_critic_is_checked_all_the_same():
    (error,) = errors_of(method="grpo", critics=[{"model": "c", "rank": 1}])
    assert error == "critics.0.rank: unknown key; did you mean 'ranks'?"


def test_asyppo_takes_one_two_or_four_critics():
    critics = [{"model": "c", "ranks": r} for r in range(1, 5)]
    for count in (2, 4):
        assert build_config(tree(critics=critics, critics_used=count)).num_ranks == 1 + count
    none = {"advantage_mask_fraction": 0, "entropy_mask_fraction": 0}
    assert build_config(tree(critics=critics, critics_used=1, ppo=none)).num_ranks == 2
    assert build_config(tree(critics=critics, method="naive_ensemble", critics_used=3)).num_critics == 3


def test_shared_data_need_no_equal_shares():
    config = build_config(tree(method="naive_ensemble", rollout={"responses_per_prompt": 3}))
    assert config.num_critics == 2


def test_the_critic_of_symmetric_ppo_starts_from_the_actors_model():
    config = build_config(tree(method="symmetric_ppo"))
    assert [c.model for c in config.critics] == [Path("a")] and config.critics[0].ranks == (1,)


def test_other_settings_without_a_method_are_custom():
    none = {"advantage_mask_fraction": 0, "entropy_mask_fraction": 0}
    config = build_config(tree(critics=[], ppo={"advantage": "grpo", **none}))
    assert config.method == "custom" and config.ppo.entropy_coef == 0.01
    assert build_config(tree()).method == "asyppo"


def test_the_policy_learns_after_the_warm_up_and_then_at_every_kth_step():
    ppo = build_config(tree(ppo={"critic_warmup_steps": 2, "policy_every": 3})).ppo
    assert [step for step in range(12) if ppo.updates_policy(step)] == [4, 7, 10]
    assert [step for step in range(3) if build_config(tree()).ppo.updates_policy(step)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("method", "ppo", "expected"),
    [
        ("asyppo", {}, True),
        ("grpo", {}, True),
        ("asympo", {}, False),
        ("spo", {}, False),
        ("spo", {"kl": {"coef": 0.1, "where": "reward"}}, True),
        ("asympo", {"kl": {"coef": 0.1, "where": "loss"}}, False),
    ],
)
def test_old_logprobs_are_scored_only_where_something_reads_them(method: str, ppo: dict[str, Any], expected: bool):
    assert build_config(tree(method=method, ppo=ppo)).ppo.needs_old_logprobs is expected


def test_pretraining_is_a_run_that_never_updates_the_policy():
    config, errors = pretraining(build_config(tree(method="vapo", run_dir="r", checkpoint={"export_hf": False})), 7)
    assert errors == [] and config.num_steps == 7 and not config.trains_policy and config.checkpoint.export_hf
    assert config.run_dir == Path("r/pretrain-critics") and config.eval.every == 0
    _, errors = pretraining(build_config(tree(method="grpo")), 7)
    assert errors == ["pretrain-critics: got no critics with method grpo, need one; choose another method"]
