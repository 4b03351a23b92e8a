"""A world of mixed critics and an actor, end to end, agrees with Hugging Face + `ppo/` in one process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_files import part, read, worst_gradient, worst_update, write
from parity_models import ACTOR, CRITIC, make_batch, save_model, with_rewards
from parity_reference import Policy, Trainer, Valuer, critic_parts, share, train_policy, train_valuer
from parity_world import run_forked

from asyppo_megatron.config import Config
from asyppo_megatron.parallel.seeding import derive_seed
from asyppo_megatron.ppo.ensemble import value_std
from asyppo_megatron.ppo.targets import compute_targets, monte_carlo_returns
from asyppo_megatron.types import PackedBatch, Scores

GRADIENT, UPDATE, VALUE = 1e-5, 1e-3, 1e-5
RANKS, CRITICS, SEED, STEP, TEMPERATURE = 4, 3, 11, 2, 0.9
BATCH = make_batch(groups=4, responses=6, seed=2, step=STEP)
# eps: so that an element whose gradient is rounding noise does not get a full step of either sign.
OPTIMIZER = {"lr": 1e-3, "weight_decay": 0.1, "clip_grad": 0.5, "eps": 1e-6}
PLACEMENT = {
    "actor": ((0, 1), {"tp": 2}, 64),
    "critic_0": ((0, 1, 2, 3), {"tp": 2, "pp": 2}, 80),
    "critic_1": ((2, 3), {}, 4096),
    "critic_2": ((0, 1), {"cp": 2}, 48),
}
ROLES = tuple(PLACEMENT)


@dataclass(frozen=True)
class Variant:
    """One step of a fresh world.

    Attributes:
        shifted: the critic whose own responses have other rewards than in `BATCH`.
        minis: two mini-batches and two epochs for every critic.
    """

    name: str
    order: str = "critics_first"
    shifted: int | None = None
    minis: bool = False


PLAIN = Variant("plain")
COMPARED = [PLAIN, Variant("minis", minis=True), Variant("values-first", order="values_first", minis=True)]
SHIFTED = [Variant(f"shifted-{m}", shifted=m) for m in range(CRITICS)]


def make_config(directory: Path, variant: Variant) -> Config:
    def role(name: str) -> dict[str, Any]:
        ranks, layout, tokens = PLACEMENT[name]
        values: dict[str, Any] = {
            "model": directory / ("actor" if name == "actor" else name),
            "ranks": ranks,
            "layout": layout,
            "optimizer": OPTIMIZER | ({"clip_grad": 0.0} if name == "critic_1" else {}),
            "precision": "fp32",
            "max_tokens_per_micro_batch": tokens,
        }
        if name != "actor" and variant.minis:
            values |= {"mini_batch_size": 4, "epochs": 2}
        if name != "actor" and variant.order == "values_first":
            values |= {"value_clip": 0.05}
        return values

    return Config(
        run_dir=directory / "run",
        seed=SEED,
        num_steps=4,
        actor=role("actor"),
        critics=tuple(role(name) for name in ROLES[1:]),
        ppo={"order": variant.order, "lam": 0.95, "gamma": 0.99, "entropy_coef": 0.05},
        rollout={"prompts_per_step": 4, "responses_per_prompt": 6, "temperature": TEMPERATURE},
        data={"train": directory / "none.jsonl"},
    )


def batch_of(variant: Variant) -> PackedBatch:
    if variant.shifted is None:
        return BATCH
    chosen = torch.zeros(BATCH.num_trajectories, dtype=torch.bool)
    chosen[share(BATCH, variant.shifted, CRITICS, SEED)] = True
    return with_rewards(BATCH, chosen, 0.7)


# --- the reference


def make_reference(directory: Path) -> None:
    save_model(directory / "actor", ACTOR, tied=False, seed=3)
    for m in range(CRITICS):
        save_model(directory / f"critic_{m}", CRITIC, tied=m == 1, seed=20 + m)
    for variant in COMPARED:
        reference_step(directory, variant)


def reference_step(directory: Path, variant: Variant) -> None:
    config, batch = make_config(directory, variant), BATCH
    ppo = config.ppo
    policy = Policy(directory / "actor", TEMPERATURE)
    actor = Trainer(policy.named(), config.actor.optimizer)
    valuers = [Valuer(directory / f"critic_{m}", derive_seed(SEED, "critic_head", m)) for m in range(CRITICS)]
    critics = [Trainer(v.named(), c.optimizer) for v, c in zip(valuers, config.critics, strict=True)]

    def values() -> torch.Tensor:
        with torch.no_grad():
            return torch.stack([v.values(batch) for v in valuers])

    def learn(returns: torch.Tensor, old: torch.Tensor | None) -> None:
        for m, (valuer, critic, c) in enumerate(zip(valuers, critics, config.critics, strict=True)):
            parts = critic_parts(batch, m, CRITICS, SEED, c.mini_batch_size, c.epochs)
            train_valuer(valuer, critic, batch, returns, parts, None if old is None else old[m], c.value_clip)

    with torch.no_grad():
        old_logprobs = policy.scores(batch)[0]
    if ppo.order == "critics_first":
        learn(monte_carlo_returns(batch, ppo.gamma), None)
    scores = Scores(torch.where(batch.loss_mask, old_logprobs, 0), values())
    targets = compute_targets(
        batch, scores, gamma=ppo.gamma, lam=ppo.lam, k=ppo.advantage_mask_fraction, h=ppo.entropy_mask_fraction
    )
    if ppo.order == "values_first":
        learn(targets.returns, scores.values)
    train_policy(policy, actor, batch, targets, ppo, [torch.arange(batch.num_trajectories)])
    tensors = {"values": scores.values} | targets_of(targets)
    for name, trainer in zip(ROLES, [actor, *critics], strict=True):
        tensors |= {f"{name}/grad/{n}": g for n, g in trainer.gradients.items()}
        tensors |= {f"{name}/update/{n}": u for n, u in trainer.updates().items()}
    facts = {name: t.losses for name, t in zip(ROLES, [actor, *critics], strict=True)}
    write(directory / "reference" / variant.name, tensors, facts)


def targets_of(targets: Any) -> dict[str, torch.Tensor]:
    names = ("old_logprobs", "advantages", "returns", "advantage_mask", "entropy_mask")
    return {name: getattr(targets, name) for name in names}


# --- the world


def run_variants(device: torch.device, store: Any, directory: Path, variants: list[Variant]) -> None:
    for variant in variants:
        run_step(device, store, directory, variant)
    run_on_poisoned_returns(device, store, directory)


def run_step(device: torch.device, store: Any, directory: Path, variant: Variant) -> None:
    import torch.distributed as dist
    from parity_roles import Watch

    from asyppo_megatron.observability.timing import PhaseTimer
    from asyppo_megatron.world import World

    world = World(make_config(directory, variant), device, store, PhaseTimer(device))
    watches = {name: Watch(role) for name, role in world.roles.items()}
    batch = batch_of(variant)
    scores = world.exchange(batch, world.evaluate(batch))
    targets = world.targets(batch, scores)
    world.update(batch, targets, scores)
    metrics, _ = world.metrics(batch.step, [])
    tensors = {"values": scores.values} | targets_of(targets)
    for name, watch in watches.items():
        tensors |= {f"{name}/{key}": tensor for key, tensor in watch.tensors().items()}
    write(directory / variant.name / f"rank-{dist.get_rank()}", tensors, metrics)


def run_on_poisoned_returns(device: torch.device, store: Any, directory: Path) -> None:
    """Critics update on returns that are NaN wherever the response is another critic's."""
    import torch.distributed as dist
    from parity_roles import Watch

    from asyppo_megatron.observability.timing import PhaseTimer
    from asyppo_megatron.ppo.ensemble import assign_critics
    from asyppo_megatron.world import World

    config = make_config(directory, PLAIN)
    world = World(config, device, store, PhaseTimer(device))
    assignment = assign_critics(BATCH.group_ids, CRITICS, seed=SEED, step=STEP)
    returns = monte_carlo_returns(BATCH, config.ppo.gamma)
    tensors = {}
    for m, critic in world.critics.items():
        watch = Watch(critic.role)
        own = (assignment == m).repeat_interleave(BATCH.cu_seqlens.diff().long())
        critic.update(BATCH, torch.where(own, returns, torch.nan), assignment, None)
        tensors |= {f"critic_{m}/{key}": tensor for key, tensor in watch.tensors().items()}
    write(directory / "poisoned" / f"rank-{dist.get_rank()}", tensors, {})


# --- the tests


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("critics")
    run_forked(0, path, make_reference, path)
    run_forked(RANKS, path, run_variants, path, [*COMPARED, *SHIFTED])
    return path


def ranks_of(directory: Path, name: str) -> list[tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    return [read(directory / name / f"rank-{rank}") for rank in range(RANKS)]


def stages(directory: Path, variant: str, role: str) -> list[dict[str, torch.Tensor]]:
    """The role's tensors on each of its ranks."""
    found = [part(tensors, role) for tensors, _ in ranks_of(directory, variant)]
    return [found[rank] for rank in PLACEMENT[role][0]]


@pytest.mark.parametrize("variant", COMPARED, ids=lambda v: v.name)
def test_values_of_critics_in_any_layout_agree_with_one_process(variant: Variant, directory: Path) -> None:
    expected, _ = read(directory / "reference" / variant.name)
    tolerance = VALUE * (5 if variant.minis else 1)  # after one step, or four
    for tensors, _ in ranks_of(directory, variant.name):
        torch.testing.assert_close(tensors["values"], expected["values"], rtol=0, atol=tolerance)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("variant", COMPARED, ids=lambda v: v.name)
def test_gradients_and_updates_agree_with_one_process(variant: Variant, role: str, directory: Path) -> None:
    expected, _ = read(directory / "reference" / variant.name)
    expected = part(expected, role)
    seen = set()
    for tensors in stages(directory, variant.name, role):
        deviation, name = worst_gradient(part(tensors, "grad"), part(expected, "grad"))
        assert deviation <= GRADIENT, f"gradient of {name}: off by {deviation:.1e} of its maximum"
        distance, name = worst_update(part(tensors, "update"), part(expected, "update"))
        assert distance <= UPDATE, f"update of {name}: off by {distance:.1e} in relative L2"
        seen |= part(tensors, "grad").keys()
    assert seen == part(expected, "grad").keys()


@pytest.mark.parametrize("variant", COMPARED, ids=lambda v: v.name)
def test_losses_agree_with_one_process(variant: Variant, directory: Path) -> None:
    _, expected = read(directory / "reference" / variant.name)
    for _, metrics in ranks_of(directory, variant.name):
        for role in ROLES:
            mean = sum(expected[role]) / len(expected[role])
            assert metrics[f"loss/{role}"] == pytest.approx(mean, rel=1e-5, abs=1e-6)
            assert metrics[f"updates/{role}"] == len(expected[role])


@pytest.mark.parametrize("variant", COMPARED, ids=lambda v: v.name)
def test_targets_agree_with_one_process(variant: Variant, directory: Path) -> None:
    expected, _ = read(directory / "reference" / variant.name)
    for tensors, _ in ranks_of(directory, variant.name):
        for name in ("old_logprobs", "advantages", "returns"):
            torch.testing.assert_close(tensors[name], expected[name], rtol=0, atol=2e-5)


@pytest.mark.parametrize("variant", COMPARED, ids=lambda v: v.name)
def test_masks_are_identical_where_sigma_is_further_from_the_cut_than_the_values_differ(
    variant: Variant, directory: Path
) -> None:
    expected, _ = read(directory / "reference" / variant.name)
    sigma, valid = value_std(expected["values"]), BATCH.loss_mask
    cut = int(0.2 * int(valid.sum()))
    ascending = sigma[valid].sort().values
    for tensors, _ in ranks_of(directory, variant.name):
        difference = float((tensors["values"] - expected["values"]).abs().max())
        for name, at in (("advantage_mask", cut), ("entropy_mask", len(ascending) - cut)):
            middle = (ascending[at - 1] + ascending[at]) / 2
            clear = (sigma - middle).abs() > difference
            assert clear[valid].all(), "this batch has a tie at the cut: choose another seed"
            assert torch.equal(tensors[name][clear], expected[name][clear])
            assert int(tensors[name].sum()) == int(valid.sum()) - cut


def test_every_rank_holds_the_same_bits_of_values_and_targets(directory: Path) -> None:
    first, *others = (tensors for tensors, _ in ranks_of(directory, "plain"))
    for tensors in others:
        for name in ("values", "old_logprobs", "advantages", "returns", "advantage_mask", "entropy_mask"):
            assert torch.equal(tensors[name], first[name]), name


@pytest.mark.parametrize("shifted", range(CRITICS))
def test_rewards_of_a_share_change_the_weights_of_its_critic_alone(shifted: int, directory: Path) -> None:
    for m in range(CRITICS):
        before, after = (stages(directory, name, f"critic_{m}") for name in ("plain", f"shifted-{shifted}"))
        same = [all(torch.equal(a[name], b[name]) for name in b) for a, b in zip(after, before, strict=True)]
        assert all(same) if m != shifted else not any(same)


def test_returns_outside_a_critics_share_reach_neither_gradient_nor_weights(directory: Path) -> None:
    for m in range(CRITICS):
        plain, poisoned = (stages(directory, name, f"critic_{m}") for name in ("plain", "poisoned"))
        for with_nan, without in zip(poisoned, plain, strict=True):
            assert with_nan.keys() == without.keys()
            assert all(torch.equal(with_nan[name], without[name]) for name in without)
