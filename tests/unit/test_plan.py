"""`asyppo plan`: every shipped recipe fits and is laid out, by hand-computed bytes; what cannot fit is refused."""

from __future__ import annotations

import time
from pathlib import Path
from typing import get_args

import pytest
import yaml

from asyppo_megatron.cli import main
from asyppo_megatron.config import Config, ConfigError, RoleConfig, load_config
from asyppo_megatron.demo import prepare
from asyppo_megatron.models.spec import ModelSpec
from asyppo_megatron.plan.cost import Part, Phase, part_seconds, step_seconds
from asyppo_megatron.plan.hardware import ACCELERATORS
from asyppo_megatron.plan.layout import dry_run
from asyppo_megatron.plan.parameters import (
    Parameter,
    buckets,
    model_elements,
    owned_elements,
    stage_parameters,
    state_bytes,
)
from asyppo_megatron.plan.report import make_plan, model_specs

ROOT = Path(__file__).resolve().parents[2]
MODELS = sorted((ROOT / "model_configs").glob("*.yaml"))
SIZES = ("4b", "8b", "14b")
RECIPES = sorted(p for p in (ROOT / "model_configs/runs").glob("*.yaml") if p.stem.split("_")[1:2] and
                 p.stem.split("_")[1] in SIZES)  # fmt: skip
SMALL = sorted(set((ROOT / "model_configs/runs").glob("*.yaml")) - set(RECIPES))
PUBLISHED = {
    "qwen3_0.6b": 596_049_920, "qwen3_1.7b": 1_720_574_976, "qwen3_4b": 4_022_468_096, "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200, "qwen3_32b": 32_762_123_264, "llama3.1_8b": 8_030_261_248,
    "r1_distill_qwen_7b": 7_615_616_512,
}  # fmt: skip


def spec_of(name: str) -> ModelSpec:
    path = ROOT / "model_configs" / f"{name}.yaml"
    return ModelSpec.from_architecture(yaml.safe_load(path.read_text())["architecture"], path)


def recipe(name: str, *changes: str) -> Config:
    return load_config(ROOT / "model_configs/runs" / f"{name}.yaml", list(changes))


@pytest.mark.parametrize("name", PUBLISHED)
def test_model_file_has_the_published_number_of_parameters(name: str) -> None:
    assert model_elements(spec_of(name)) == PUBLISHED[name]


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
def test_every_layout_of_a_model_file_fits_the_model(path: Path) -> None:
    tree = yaml.safe_load(path.read_text())
    spec = ModelSpec.from_architecture(tree["architecture"], path)
    for name, layout in tree["layouts"].items():
        gpus = int(name.rpartition("_")[2])
        role = RoleConfig(ranks=tuple(range(gpus)), layout=layout, **tree["role"])
        assert not spec.layout_errors(role.layout, path.stem) and role.dp >= 1


def test_there_is_a_recipe_for_every_size_method_and_placement() -> None:
    names = {p.stem for p in RECIPES}
    for size in SIZES:
        for method in ("asyppo", "ppo", "naive"):
            assert {f"{method}_{size}{s}" for s in ("", "_colocated", "_disaggregated")} <= names
        assert {f"grpo_{size}", f"grpo_{size}_disaggregated"} <= names


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_has_the_papers_settings_and_fits_80_gb(path: Path) -> None:
    config = load_config(path)
    large = "14b" in path.stem
    rollout, actor = config.rollout, config.actor
    assert (rollout.prompts_per_step, rollout.responses_per_prompt, rollout.max_prompt_tokens) == (64, 32, 1024)
    assert (rollout.max_response_tokens, rollout.top_p, rollout.top_k, rollout.temperature) == (8000, 0.99, 100, 0.99)
    assert (actor.epochs, actor.mini_batch_size) == ((4, 1024) if large else (1, 2048))
    assert (actor.optimizer.lr, actor.optimizer.weight_decay, actor.optimizer.warmup_steps) == (1e-6, 0, 50)
    for critic in config.critics:
        assert (critic.optimizer.lr, critic.optimizer.weight_decay, critic.optimizer.warmup_steps) == (1e-5, 0.01, 5)
    assert len(config.critics) == {"asyppo": 2, "ppo": 1, "naive": 1, "grpo": 0}[path.stem.split("_")[0]]
    paper = 32 if large else 16
    alone = path.stem.startswith("grpo") or path.stem.endswith("_colocated")
    assert config.num_ranks == (paper // 2 if alone else paper)
    assert not make_plan(path.stem, config, ACCELERATORS["H100"]).misfits


@pytest.mark.parametrize("path", SMALL, ids=lambda p: p.stem)
def test_a_small_recipe_is_laid_out_around_the_demos_models(path: Path, tmp_path: Path) -> None:
    prepare.actor_config().save_pretrained(tmp_path / "actor")
    prepare.critic_config().save_pretrained(tmp_path / "critic")
    models = [f"actor.model={tmp_path / 'actor'}", f"critics.*.model={tmp_path / 'critic'}"]
    plan = make_plan(path.stem, load_config(path, models), ACCELERATORS["H100"])
    assert len(plan.layout) == len(plan.config.roles()) and not plan.misfits


def test_elements_of_a_rank_by_hand() -> None:
    """Hidden 96, 4 heads of 24, 2 kv heads, ffn 192, 3 layers, vocabulary 512, untied, tp 2."""
    held = {p.name: p.elements for p in stage_parameters(spec_of("tiny"), "actor", tp=2, pp=1, stage=0)}
    assert held["embedding.word_embeddings.weight"] == 256 * 96
    assert held["decoder.layers.1.self_attention.linear_qkv.weight"] == (96 + 48 + 48) // 2 * 96
    assert held["decoder.layers.1.self_attention.linear_proj.weight"] == 96 * 48
    assert held["decoder.layers.1.mlp.linear_fc1.weight"] == 2 * 96 * 96
    assert held["decoder.layers.1.self_attention.q_layernorm.weight"] == 24
    assert held["output_layer.weight"] == 256 * 96


def test_gradient_buffer_aligns_parameters_and_divides_by_ranks() -> None:
    """Reversed: 10 at 0, 100 at 64, so 164 elements; padded to lcm(3, 128) = 384, 128 a rank."""
    parameters = [Parameter("a", 100), Parameter("b", 10)]
    assert buckets(parameters, 3) == [(384, [(0, 10), (64, 164)])]
    assert owned_elements(parameters, 3) == [10 + 64, 36, 0]


def test_embedding_that_two_stages_share_has_a_bucket_of_its_own() -> None:
    parameters = [Parameter("embedding", 100, alone=True), Parameter("a", 10)]
    assert [size for size, _ in buckets(parameters, 2)] == [128, 128]


def test_bytes_of_a_model_by_hand() -> None:
    """7.4 billion parameters on one rank: bf16 weights, fp32 gradients; fp32 weights and two moments shared by dp 4."""
    role = RoleConfig(model="x", ranks=(0, 1, 2, 3), precision="bf16")
    spec = spec_of("qwen3_0.6b")
    per_rank = state_bytes(spec, "actor", role, 0)
    count = PUBLISHED["qwen3_0.6b"]
    assert len(per_rank) == 4 and sum(s.optimizer for s in per_rank) == 12 * count
    assert all(s.gradients == 2 * s.parameters for s in per_rank)
    assert 0 <= per_rank[0].parameters - 2 * count < 2 * (64 * 311 + 512)
    whole = RoleConfig(model="x", ranks=(0, 1), precision="fp32", optimizer={"distributed": False})
    assert state_bytes(spec, "actor", whole, 0)[1].total == 16 * count


def test_paper_14b_layout_on_32_simulated_ranks() -> None:
    config = recipe("asyppo_14b")
    actor, first, second = dry_run(config, model_specs(config))
    assert actor.groups["tp"] == [tuple(range(8)), tuple(range(8, 16))]
    assert actor.outputs == [0, 8] and first.layout.ranks == tuple(range(16, 24))
    assert second.outputs == [24, 26, 28, 30]


def test_14b_on_1024_ranks_is_planned_in_under_a_minute() -> None:
    started = time.monotonic()
    config = recipe(
        "asyppo_14b", "actor.ranks=0-511", "critics.0.ranks=512-767", "critics.1.ranks=768-1023",
        "rollout.prompts_per_step=512", "actor.layout.pp=2",
    )  # fmt: skip
    plan = make_plan("large", config, ACCELERATORS["H100"])
    assert time.monotonic() - started < 60
    assert len(plan.ranks) == 1024 and not plan.misfits
    assert [rank for rank, _ in plan.layout[0].senders] == [0, 256]
    total = sum(count for _, count in plan.layout[0].senders)
    assert total == 2 * PUBLISHED["qwen3_14b"]


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        (["actor.layout.tp=1", "actor.optimizer.distributed=false"], "actor.optimizer.distributed=true"),
        (["actor.recompute=none", "actor.max_tokens_per_micro_batch=131072"], "set actor.recompute=full"),
        (["actor.layout.tp=1"], "raise actor.layout.tp or pp"),
        (["actor.max_tokens_per_micro_batch=500000"], "set actor.fused_head=true"),
        (["rollout.sglang.mem_fraction=0.9"], "lower rollout.sglang.mem_fraction"),
        (["rollout.sglang.mem_fraction=0.19"], "engine: got room for"),
    ],
)
def test_what_cannot_fit_is_refused_with_what_to_change(
    changes: list[str], advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(ROOT / "model_configs/runs/asyppo_14b.yaml")
    assert main(["plan", path, *(x for c in changes for x in ("--set", c))]) == 1
    out = capsys.readouterr().out
    assert "does NOT fit" in out and advice in out


def test_comparison_shows_that_small_critics_need_less(capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(ROOT / f"model_configs/runs/{n}_14b.yaml") for n in ("ppo", "asyppo")]
    assert main(["plan", *paths]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in reversed(lines) if line.startswith("asyppo_14b"))
    memory, seconds = row.split()[5], row.split()[8]
    assert memory.startswith("-") and seconds.startswith("-"), row


def test_what_is_offloaded_leaves_its_room_to_the_engines() -> None:
    """Of 80 GB 73.3 are for tensors; 0.7 of them for engines leave 17.3, and the actor's state has 22.2."""
    config = recipe("asyppo_14b", "rollout.sglang.mem_fraction=0.7")
    assert [m.partition(",")[0] for m in make_plan("kept", config, ACCELERATORS["H100"]).misfits] == [
        "engine: got mem_fraction 0.7 beside 22.2 GB of weights and optimizer state"
    ]
    moved = recipe("asyppo_14b", "rollout.sglang.mem_fraction=0.7", "actor.offload=optimizer")
    assert not make_plan("moved", moved, ACCELERATORS["H100"]).misfits


def test_a_step_takes_the_time_of_the_busiest_rank_in_each_part() -> None:
    def phase(part: str, seconds: float, *ranks: int) -> Phase:
        return Phase("", part, 0.0, 0.0, seconds, ranks)  # type: ignore[arg-type]

    found = [phase("rollouts", 10.0), phase("scores", 3.0, 0), phase("scores", 4.0, 1), phase("updates", 5.0, 0),
             phase("updates", 6.0, 0, 1), phase("sync", 1.0, 0)]  # fmt: skip
    assert step_seconds(found, is_ahead=False) == 10 + 4 + (5 + 6) + 1
    assert step_seconds(found, is_ahead=True) == 4 + (5 + 6) + 1


def test_critics_that_learn_second_do_so_beside_the_actor() -> None:
    for order, part in (("critics_first", "scores"), ("values_first", "updates")):
        plan = make_plan(order, recipe("ppo_14b", f"ppo.order={order}"), ACCELERATORS["H100"])
        assert [p.part for p in plan.phases if p.name == "critic_0 update"] == [part]


def test_generation_runs_beside_training_only_on_gpus_of_its_own() -> None:
    for name, is_beside in (("asyppo_14b", False), ("asyppo_14b_disaggregated", True)):
        plan = make_plan(name, recipe(name), ACCELERATORS["H100"])
        whole = sum(part_seconds(plan.phases, part) for part in get_args(Part))
        assert (plan.seconds < whole) == is_beside


def test_mini_critics_in_the_actors_layout_take_a_fifth_less_memory_of_each_gpu() -> None:
    """14.8 + 14.0 billion parameters against 14.8 + 2 x 4.0: 21 % less state, beside the same activations."""
    plans = [
        make_plan(n, recipe(f"{n}_14b_colocated", "critics.*.layout.tp=8"), ACCELERATORS["H100"])
        for n in ("ppo", "asyppo")
    ]
    states = [sum(r.state.total for r in p.ranks[0].roles) for p in plans]
    assert states[1] / states[0] == pytest.approx((14.768 + 2 * 4.022) / (14.768 + 13.991), abs=0.005)
    assert plans[1].peak / plans[0].peak == pytest.approx(0.82, abs=0.01)


def test_model_file_gives_defaults_that_a_role_can_override(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text((ROOT / "model_configs/tiny.yaml").read_text())
    text = "actor: {model_file: model.yaml, layout: ranks_2, ranks: 0-1, precision: bf16}\ncritics: []\n"
    (tmp_path / "run.yaml").write_text(text + "method: grpo\ndata: {train: x.jsonl}\n")
    actor = load_config(tmp_path / "run.yaml").actor
    assert (actor.precision, actor.layout.tp, str(actor.model)) == ("bf16", 2, "models/tiny")
    assert actor.model_file == tmp_path / "model.yaml"
    (tmp_path / "run.yaml").write_text(text.replace("ranks_2", "ranks_3") + "data: {train: x.jsonl}\n")
    with pytest.raises(ConfigError, match="got layout 'ranks_3', need one of ranks_1, ranks_2"):
        load_config(tmp_path / "run.yaml")
    (tmp_path / "run.yaml").write_text(text.replace("model.yaml", "none.yaml") + "data: {train: x.jsonl}\n")
    with pytest.raises(ConfigError, match=r"actor\.model_file: .*none\.yaml: got No such file"):
        load_config(tmp_path / "run.yaml")


def test_a_file_stands_on_its_base(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "method: grpo\nactor: {model: m, optimizer: {lr: 1.0, eps: 0.5}}\ndata: {train: x}\n"
    )
    (tmp_path / "b.yaml").write_text("base: a.yaml\nactor: {optimizer: {lr: 2.0}}\n")
    optimizer = load_config(tmp_path / "b.yaml").actor.optimizer
    assert (optimizer.lr, optimizer.eps) == (2.0, 0.5)
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    with pytest.raises(ConfigError, match="no circle"):
        load_config(tmp_path / "b.yaml")
