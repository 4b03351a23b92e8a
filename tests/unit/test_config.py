"""The configuration: what is accepted, what is refused, and with which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from asyppo_megatron.config import Config, ConfigError, build_config, dump_config, load_config, parse_override

ROOT = Path(__file__).resolve().parents[2]


def tree(**sections: Any) -> dict[str, Any]:
    """A valid configuration (M = 2, every role on a rank of its own), with sections changed."""
    base = {
        "actor": {"model": "a", "ranks": "0-1", "layout": {"tp": 2}},
        "critics": [{"model": "c", "ranks": 2}, {"model": "c", "ranks": 3}],
        "data": {"train": "t.jsonl", "eval": [{"name": "x", "path": "x.jsonl"}]},
    }
    for name, values in sections.items():
        base[name] = {**base[name], **values} if isinstance(values, dict) and name in base else values
    return base


def errors_of(**sections: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        build_config(tree(**sections))
    return caught.value.errors


def test_defaults_are_the_papers():
    config = build_config(tree())
    assert config.num_critics == 2 and config.num_ranks == 4 and config.batch_size == 64 * 32
    assert (config.ppo.advantage_mask_fraction, config.ppo.entropy_mask_fraction) == (0.2, 0.2)
    assert config.ppo.entropy_coef == 0.01 and config.ppo.order == "critics_first"
    assert config.logging.wandb == "disabled"
    assert list(config.roles()) == ["actor", "critic_0", "critic_1"]


@pytest.mark.parametrize(
    ("ranks", "expected"), [(3, (3,)), ("0-2", (0, 1, 2)), ("0,2-3", (0, 2, 3)), ([1, 0], (1, 0)), ("5", (5,))]
)
def test_ranks_may_be_a_number_a_span_or_a_list(ranks, expected):
    config = Config.model_validate(tree(actor={"ranks": ranks, "layout": {}}))
    assert config.actor.ranks == expected


def test_sequence_parallel_follows_tensor_parallel_unless_said():
    assert build_config(tree()).actor.layout.sp
    assert not build_config(tree(actor={"layout": {"tp": 2, "sequence_parallel": False}})).actor.layout.sp
    assert not build_config(tree()).critics[0].layout.sp


def test_a_dumped_configuration_reads_back_equal(tmp_path):
    config = build_config(tree(seed=7, run_dir=str(tmp_path)))
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


def test_sections_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        build_config(tree()).ppo.gamma = 0.5


@pytest.mark.parametrize(
    ("sections", "errors"),
    [
        ({"ppo": {"gama": 1}}, ["ppo.gama: unknown key; did you mean 'gamma'?"]),
        ({"sed": 1}, ["sed: unknown key; did you mean 'seed'?"]),
        (
            {"critics": [{"model": "c", "ranks": 2, "optimizer": {"leaning_rate": 1}}] * 2},
            [
                "critics.0.optimizer.leaning_rate: unknown key; known here: lr, min_lr, weight_decay, beta1, beta2, "
                "eps, clip_grad, warmup_steps, decay, decay_steps, distributed",
            ]
            * 2,
        ),
        ({"data": {"train": 3}}, ["data.train: Input is not a valid path for <class 'pathlib.Path'> (got 3)"]),
        ({"actor": {"ranks": "0-x"}}, ["actor.ranks: got '0-x', need ranks like '0-7' or '0,2-3' (got '0-x')"]),
        ({"ppo": {"gamma": 2}}, ["ppo.gamma: Input should be less than or equal to 1 (got 2)"]),
    ],
)
def test_what_a_value_alone_gets_wrong(sections, errors):
    found = errors_of(**sections)
    assert [e.replace("critics.1", "critics.0") for e in found] == errors


def test_a_missing_section_is_named():
    with pytest.raises(ConfigError, match="actor: missing, need a value") as caught:
        build_config({"data": {"train": "t"}})
    assert len(caught.value.errors) == 1


@pytest.mark.parametrize(
    ("sections", "error"),
    [
        (
            {"actor": {"ranks": "0-1", "layout": {"tp": 4}}},
            "actor.layout: got tp 4 x pp 1 x cp 1 = 4 on 2 ranks, need a divisor of 2; change the layout or "
            "actor.ranks",
        ),
        (
            {"actor": {"ranks": "0-3", "layout": {"cp": 2, "tp": 2}, "max_tokens_per_micro_batch": 3}},
            "actor.max_tokens_per_micro_batch: got 3, need at least 4, which packs are padded to a multiple of with tp "
            "2 and cp 2; raise it",
        ),
        (
            {"actor": {"fused_head_fp32_logits": True}},
            "actor.fused_head_fp32_logits: got true without the fused head; set actor.fused_head=true",
        ),
        (
            {"actor": {"fused_head": True}, "ppo": {"kl": {"coef": 0.1}}},
            "actor.fused_head: got true with a KL term in the loss, which it does not compute; leave one of the two "
            "out",
        ),
        (
            {"actor": {"fused_head": True}, "ppo": {"positive_nll_coef": 0.1}},
            "actor.fused_head: got true with ppo.positive_nll_coef, which it does not compute; leave one of the two "
            "out",
        ),
        (
            {"actor": {"fused_head": True}, "ppo": {"loss": "gspo"}, "method": "custom"},
            "actor.fused_head: got true with ppo.loss gspo, which needs sums over a response; need one of ppo, cispo, "
            "aspo, or set actor.fused_head=false",
        ),
        ({"actor": {"ranks": [0, 0, 1, 1]}}, "actor.ranks: got [0, 0, 1, 1], need distinct ranks >= 0"),
        (
            {"actor": {"layout": {"sequence_parallel": True}}},
            "actor.layout.sequence_parallel: got true with tp 1, need tp > 1; leave it out",
        ),
        (
            {"actor": {"mini_batch_size": 100}},
            "actor.mini_batch_size: got 100, need a divisor of the 2048 responses of a step "
            "(rollout.prompts_per_step x responses_per_prompt)",
        ),
        (
            {"actor": {"optimizer": {"lr": 1e-6, "min_lr": 1e-5}}},
            "actor.optimizer.min_lr: got 1e-05 > lr 1e-06; lower it",
        ),
        (
            {"critics": [{"model": "c", "ranks": "1-2"}, {"model": "c", "ranks": 3}]},
            "ranks: got actor on [0, 1] and critic_0 on [1, 2], which overlap in part; give them the same ranks, one "
            "inside the other, or disjoint ones",
        ),
        (
            {"critics": [{"model": "c", "ranks": 3}, {"model": "c", "ranks": 4}]},
            "ranks: got no role on [2], need every rank from 0 to 4 used; close the gap",
        ),
        (
            {"ppo": {"advantage_mask_fraction": 0.6, "entropy_mask_fraction": 0.5}},
            "ppo: got advantage_mask_fraction 0.6 + entropy_mask_fraction 0.5 > 1; lower one",
        ),
        (
            {"critics": [{"model": "c", "ranks": 2}], "ppo": {"entropy_mask_fraction": 0}},
            "ppo: got masks (advantage 0.2, entropy 0.0) with 1 critic(s), need >= 2 to disagree; add a critic or set "
            "both fractions to 0",
        ),
        (
            {"critics": [], "ppo": {"advantage_mask_fraction": 0, "entropy_mask_fraction": 0}},
            "critics: got none with ppo.advantage gae, need >= 1; add a critic or choose grpo/dr_grpo/rloo",
        ),
        (
            {"ppo": {"advantage": "grpo"}},
            "critics: got 2 with ppo.advantage grpo, which uses none; remove them or choose gae",
        ),
        (
            {"rollout": {"responses_per_prompt": 3}},
            "rollout.responses_per_prompt: got 3, not divisible by 2 critics; choose a multiple of 2 or set "
            "ppo.share_remainder to rotate or drop",
        ),
        (
            {"rollout": {"top_k": 1}},
            "rollout: got top_k 1 with top_p < 1, need one of them; set top_p 1.0 for greedy rollouts",
        ),
        (
            {"data": {"eval": [{"name": "x", "path": "a"}, {"name": "x", "path": "b"}]}},
            "data.eval: got names ['x', 'x'], need distinct ones; rename one",
        ),
        (
            {"critics": [{"model": "c", "ranks": 2, "value_clip": 0.2}, {"model": "c", "ranks": 3}]},
            "critics.0.value_clip: got 0.2 with ppo.order critics_first, which has no values from before the update; "
            "set ppo.order values_first or leave it out",
        ),
        (
            {"data": {"eval": []}, "eval": {"every": 5}},
            "eval.every: got a period but no data.eval set; add one or set eval.every=0",
        ),
    ],
)
def test_what_sections_get_wrong_together(sections, error):
    if "actor" in sections:
        sections["actor"].setdefault("layout", {})
    assert errors_of(**sections) == [error]


def test_one_response_a_prompt_has_no_group_to_compare_with():
    none = {"advantage_mask_fraction": 0, "entropy_mask_fraction": 0}
    errors = errors_of(critics=[], ppo={"advantage": "rloo", **none}, rollout={"responses_per_prompt": 1})
    assert errors == ["rollout.responses_per_prompt: got 1 with ppo.advantage rloo, need >= 2"]


def test_a_remainder_of_responses_is_fine_when_it_may_rotate_or_be_dropped():
    for how in ("rotate", "drop"):
        build_config(tree(rollout={"responses_per_prompt": 3}, ppo={"share_remainder": how}))


def test_all_errors_come_at_once():
    errors = errors_of(
        actor={"layout": {"tp": 4}}, rollout={"responses_per_prompt": 3}, eval={"every": 1}, data={"eval": []}
    )
    assert len(errors) == 3


def write(path: Path, content: dict[str, Any] | str) -> Path:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_overrides_reach_every_place(tmp_path):
    path = write(tmp_path / "c.yaml", tree())
    overrides = ["critics.1.optimizer.lr=0.5", "critics.*.epochs=2", "ppo.kl.coef=1e-3", "seed=", "num_steps=7"]
    with pytest.raises(ConfigError, match="seed: "):
        load_config(path, overrides)
    config = load_config(path, [o for o in overrides if o != "seed="])
    assert [c.optimizer.lr for c in config.critics] == [1e-6, 0.5]
    assert [c.epochs for c in config.critics] == [2, 2]
    assert config.ppo.kl.coef == 1e-3 and config.num_steps == 7 and config.uses_reference


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("seed", "override: got 'seed', need key=value"),
        ("=1", "override: got '=1', need key=value"),
        ("seed=[", "override seed: value '[' is not YAML"),
        ("critics.2.ranks=1", "override critics.2.ranks: got index '2', need 0..1 or *"),
        ("critics.x.ranks=1", "override critics.x.ranks: got index 'x', need 0..1 or *"),
        ("ppo.gama=1", "ppo.gama: unknown key; did you mean 'gamma'?"),
    ],
)
def test_a_wrong_override_is_refused(tmp_path, override, error):
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path / "c.yaml", tree()), [override])
    assert len(caught.value.errors) == 1 and caught.value.errors[0].startswith(error)


@pytest.mark.parametrize(
    ("content", "error"),
    [("a: [", "c.yaml: is not YAML"), ("- a", "c.yaml: got list, need a mapping of sections"), ("", "got NoneType")],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path, content, error):
    with pytest.raises(ConfigError, match=error):
        load_config(write(tmp_path / "c.yaml", content))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none.yaml: cannot be read: No such file or directory"):
        load_config(tmp_path / "none.yaml")


def test_an_override_is_read_as_yaml():
    assert parse_override("a.b=1e-3") == (["a", "b"], "1e-3")  # YAML 1.1 wants 1.0e-3; pydantic reads the text
    assert parse_override("a=[1, 2]") == (["a"], [1, 2])
    assert parse_override("a=b=c") == (["a"], "b=c")
    assert parse_override("a=") == (["a"], "")


@pytest.mark.parametrize("path", sorted((ROOT / "model_configs" / "runs").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_recipes_that_ship_are_valid(path):
    assert load_config(path).num_ranks >= 1
