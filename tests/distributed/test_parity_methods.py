"""One method of each kind, in several layouts, agrees with Hugging Face + `ppo/` in one process.

Kinds: group advantages, the ratio of a whole sequence, GAE with its own lambdas, critics on shared data, a reference KL
in the loss and in the reward, clip ranges by entropy, and losses without old logprobs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_files import TIED_COPY, part, read, worst_gradient, worst_update, write
from parity_models import ACTOR, CRITIC, make_batch, save_model
from parity_reference import Policy, Trainer, Valuer, of_trajectories, train_valuer
from parity_world import run_forked

from asyppo_megatron.config import Config, build_config
from asyppo_megatron.packing import mini_batches
from asyppo_megatron.parallel.seeding import derive_seed
from asyppo_megatron.ppo.advantages import length_adaptive_lambda
from asyppo_megatron.ppo.losses import high_entropy_clip, kl_loss, policy_loss, positive_nll_loss
from asyppo_megatron.ppo.segments import token_sequences
from asyppo_megatron.ppo.targets import compute_targets, monte_carlo_returns
from asyppo_megatron.types import PackedBatch, Scores, Targets

GRADIENT, UPDATE, LOGPROB = 2e-5, 1e-3, 1e-5
RANKS, SEED, STEP, TEMPERATURE = 4, 5, 2, 0.9
ROLES = ("actor", "critic_0", "critic_1")
WHOLE, SMALL = 4096, 24  # tokens of a micro-batch: everything, or two or three sequences
BATCH = make_batch(groups=4, responses=4, seed=8, step=STEP)
OPTIMIZER = {"lr": 1e-3, "weight_decay": 0.1, "clip_grad": 0.5, "eps": 1e-6}
MINI, LONGEST = 8, 16  # responses of an optimizer step of the actor, tokens of a response


@dataclass(frozen=True)
class Method:
    """A method and what is set besides."""

    name: str
    method: str
    ppo: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Layout:
    name: str
    ranks: tuple[int, ...]
    tp: int = 1
    pp: int = 1
    max_tokens: int = WHOLE
    cp: int = 1
    critic: tuple[int, ...] = (2, 3)


METHODS = [
    Method("grpo", "grpo"),
    Method("dr-grpo", "dr_grpo"),
    Method("gspo", "gspo", (("clip_low", 0.02), ("clip_high", 0.02))),
    Method("vapo", "vapo", (("critic_warmup_steps", 0), ("lam", 0.9))),
    Method("naive-ensemble", "naive_ensemble"),
    Method("kl-loss", "grpo", (("kl", {"coef": 0.5, "kind": "k3"}),)),
    Method("kl-reward", "ppo", (("kl", {"coef": 0.2, "kind": "k1", "where": "reward"}), ("lam", 0.95))),
    Method("aspo", "aspo"),
    Method("asympo", "asympo"),
]
LAYOUTS = [
    Layout("tp2-pp2-sp", (0, 1, 2, 3), tp=2, pp=2),
    Layout("dp4-small", (0, 1, 2, 3), max_tokens=SMALL),
    Layout("tp2-dp2", (0, 1, 2, 3), tp=2, critic=(3,)),
    Layout("tp2-cp2-small", (0, 1, 2, 3), tp=2, cp=2, max_tokens=SMALL),
]
MATRIX = [
    Layout(f"tp{tp}-pp{pp}-dp{count // (tp * pp)}-{tokens}", tuple(range(count)), tp, pp, tokens, critic=(0,))
    for count, tp, pp in [(1, 1, 1), (2, 2, 1), (2, 1, 2), (2, 1, 1), (4, 1, 2), (4, 1, 4), (4, 2, 2)]
    for tokens in (WHOLE, SMALL)
]
DEFAULT = [(m, layout) for m in METHODS for layout in LAYOUTS[:2]] + [
    (METHODS[0], LAYOUTS[2]),
    (METHODS[2], LAYOUTS[2]),
    *((m, LAYOUTS[3]) for m in METHODS if m.name in ("gspo", "vapo", "aspo", "asympo", "kl-loss")),
]
SLOW = [(m, layout) for m in METHODS for layout in MATRIX]


def case_name(case: Any) -> str:
    return case.name


def make_config(directory: Path, method: Method, layout: Layout | None = None) -> Config:
    layout = layout or Layout("one", (0,), critic=(0,))
    role = {"optimizer": OPTIMIZER, "precision": "fp32", "max_tokens_per_micro_batch": layout.max_tokens}
    actor = {
        "model": directory / "actor",
        "ranks": layout.ranks,
        "layout": {"tp": layout.tp, "pp": layout.pp, "cp": layout.cp},
    }
    tree = {
        "run_dir": directory / "run",
        "seed": SEED,
        "num_steps": 4,
        "method": method.method,
        "actor": actor | role | {"mini_batch_size": MINI},
        "critics": [role | {"model": directory / "critic", "ranks": layout.critic}] * 2,
        "reference": {"model": directory / "reference"},
        "ppo": dict(method.ppo),
        "rollout": {"prompts_per_step": 4, "responses_per_prompt": 4, "temperature": TEMPERATURE}
        | {"max_response_tokens": LONGEST},
        "data": {"train": directory / "none.jsonl"},
    }
    return build_config(tree)


# --- the reference


def make_reference(directory: Path) -> None:
    save_model(directory / "actor", ACTOR, tied=True, seed=3)
    save_model(directory / "reference", ACTOR, tied=True, seed=4)
    save_model(directory / "critic", CRITIC, tied=False, seed=5)
    for method in METHODS:
        reference_step(directory, method)


def reference_step(directory: Path, method: Method) -> None:
    config = make_config(directory, method)
    ppo = config.ppo
    policy = Policy(directory / "actor", TEMPERATURE)
    actor = Trainer(policy.named(), config.actor.optimizer)
    valuers = [Valuer(directory / "critic", derive_seed(SEED, "critic_head", m)) for m in range(config.num_critics)]
    critics = [Trainer(v.named(), c.optimizer) for v, c in zip(valuers, config.critics, strict=True)]
    fresh = [v.values(BATCH).detach() for v in valuers]

    def learn(returns: torch.Tensor) -> list[list[float]]:
        for valuer, critic in zip(valuers, critics, strict=True):
            train_valuer(valuer, critic, BATCH, returns, [torch.arange(BATCH.num_trajectories)])
        return [explained(values, returns) for values in fresh]

    facts: dict[str, Any] = {}
    if ppo.order == "critics_first":
        facts["explained"] = learn(monte_carlo_returns(BATCH, ppo.gamma))
    targets = reference_targets(directory, config, policy, valuers)
    if ppo.order == "values_first":
        facts["explained"] = learn(targets.returns)
    for chosen in mini_batches(BATCH.num_trajectories, MINI, seed=SEED, step=STEP, epoch=0):
        actor.step(reference_loss(policy, targets, config, chosen))
    tensors = {"old_logprobs": targets.old_logprobs, "advantages": targets.advantages, "returns": targets.returns}
    for name, trainer in zip(ROLES, [actor, *critics], strict=False):
        tensors |= {f"{name}/grad/{n}": g for n, g in trainer.gradients.items()}
        tensors |= {f"{name}/update/{n}": u for n, u in trainer.updates().items()}
        facts[name] = trainer.losses
    write(directory / "expected" / method.name, tensors, facts)


def explained(values: torch.Tensor, returns: torch.Tensor) -> list[float]:
    """1 - Var(R - V) / Var(R) over all tokens, and over each response's first and last."""
    tokens = [
        t.nonzero().flatten() + s for t, s in zip(split(BATCH.loss_mask), BATCH.cu_seqlens.tolist(), strict=False)
    ]
    places = [torch.cat(tokens), torch.stack([t[0] for t in tokens]), torch.stack([t[-1] for t in tokens])]
    return [float(1 - (returns[p] - values[p]).var(correction=0) / returns[p].var(correction=0)) for p in places]


def split(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return x.split(BATCH.cu_seqlens.diff().tolist())


@torch.no_grad()
def reference_targets(directory: Path, config: Config, policy: Policy, valuers: list[Valuer]) -> Targets:
    ppo, mask = config.ppo, BATCH.loss_mask
    old = policy.scores(BATCH)[0] if ppo.needs_old_logprobs else BATCH.rollout_logprobs
    reference = None
    if config.uses_reference:
        reference = torch.where(mask, Policy(directory / "reference", TEMPERATURE).scores(BATCH)[0], 0)
    values = torch.stack([v.values(BATCH) for v in valuers]) if valuers else torch.zeros(0, BATCH.num_tokens)
    lam: Any = ppo.lam
    if ppo.length_adaptive_alpha is not None:
        lam = length_adaptive_lambda(mask, BATCH.cu_seqlens, ppo.length_adaptive_alpha)
    return compute_targets(
        BATCH, Scores(torch.where(mask, old, 0), values, reference), advantage=ppo.advantage, gamma=ppo.gamma, lam=lam,
        critic_lam=ppo.critic_lam, kl_coef=ppo.kl.coef if ppo.has_kl_reward else 0.0, kl_kind=ppo.kl.kind,
    )  # fmt: skip


def reference_loss(policy: Policy, targets: Targets, config: Config, chosen: torch.Tensor) -> torch.Tensor:
    """The loss of one mini-batch, whole."""
    ppo, cu = config.ppo, BATCH.cu_seqlens
    mask = BATCH.loss_mask & of_trajectories(BATCH, chosen)
    logprobs, entropies = policy.scores(BATCH)
    clip: Any = (ppo.clip_low, ppo.clip_high)
    if ppo.high_entropy_clip is not None:
        wide = {"high_entropy": ppo.high_entropy_clip, "fraction": ppo.high_entropy_fraction}
        clip = [high_entropy_clip(entropies, BATCH.loss_mask, cu, clip=c, **wide) for c in clip]
    shape = {"aggregation": ppo.aggregation, "length_norm": float(LONGEST)}
    total, count = policy_loss(
        logprobs, entropies, targets.old_logprobs, targets.advantages, mask, cu, kind=ppo.loss, clip_low=clip[0],
        clip_high=clip[1], entropy_coef=ppo.entropy_coef, **shape,
    )  # fmt: skip
    loss = total / count
    if ppo.kl.coef and ppo.kl.where == "loss":
        total, count = kl_loss(logprobs, targets.reference_logprobs, mask, cu, kind=ppo.kl.kind, **shape)
        loss = loss + ppo.kl.coef * total / count
    if ppo.positive_nll_coef:
        total, count = positive_nll_loss(logprobs, (BATCH.rewards > 0)[token_sequences(mask, cu)], mask)
        loss = loss + ppo.positive_nll_coef * total / count
    return loss


# --- the world


def run_cases(device: torch.device, store: Any, directory: Path, cases: list[tuple[Method, Layout]]) -> None:
    import torch.distributed as dist
    from parity_roles import Watch

    from asyppo_megatron.observability.timing import PhaseTimer
    from asyppo_megatron.world import World

    for method, layout in cases:
        world = World(make_config(directory, method, layout), device, store, PhaseTimer(device))
        watches = {name: Watch(role) for name, role in world.roles.items()}
        batch: PackedBatch = BATCH
        local = world.evaluate(batch)
        scores = world.exchange(batch, local)
        targets = world.targets(batch, scores)
        world.update(batch, targets, scores)
        metrics, _ = world.metrics(batch.step, [])
        tensors = {"old_logprobs": targets.old_logprobs, "advantages": targets.advantages, "returns": targets.returns}
        for name, watch in watches.items():
            tensors |= {f"{name}/{key}": tensor for key, tensor in watch.tensors().items()}
        facts = metrics | {"scored": sorted(local), "roles": list(world.groups)}
        write(directory / f"{method.name}-{layout.name}" / f"rank-{dist.get_rank()}", tensors, facts)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("methods")
    run_forked(0, path, make_reference, path)
    return path


@pytest.fixture(scope="module")
def quick(directory: Path) -> Path:
    run_forked(RANKS, directory, run_cases, directory, DEFAULT, timeout_s=600)
    return directory


@pytest.fixture(scope="module")
def matrix(directory: Path) -> Path:
    run_forked(RANKS, directory, run_cases, directory, SLOW, timeout_s=1800)
    return directory


def results(directory: Path, method: Method, layout: Layout) -> list[tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    return [read(directory / f"{method.name}-{layout.name}" / f"rank-{rank}") for rank in range(RANKS)]


def check_case(directory: Path, method: Method, layout: Layout) -> None:
    expected, losses = read(directory / "expected" / method.name)
    ranks = results(directory, method, layout)
    for tensors, metrics in ranks:
        for name in ("old_logprobs", "advantages", "returns"):
            torch.testing.assert_close(tensors[name], expected[name], rtol=0, atol=5 * LOGPROB)
        assert metrics["loss/actor"] == pytest.approx(sum(losses["actor"]) / len(losses["actor"]), rel=1e-4, abs=2e-6)
    for role in ROLES:
        wanted = part(expected, role)
        seen: set[str] = set()
        for tensors, _ in ranks:
            own = part(tensors, role)
            if not own:
                continue  # another rank's role
            deviation, name = worst_gradient(part(own, "grad"), part(wanted, "grad"))
            assert deviation <= GRADIENT, f"{role}: gradient of {name}: off by {deviation:.1e} of its maximum"
            distance, name = worst_update(part(own, "update"), part(wanted, "update"))
            assert distance <= UPDATE, f"{role}: update of {name}: off by {distance:.1e} in relative L2"
            seen |= {n.removeprefix(TIED_COPY) for n in part(own, "grad")}
        assert seen == part(wanted, "grad").keys()


@pytest.mark.parametrize(("method", "layout"), DEFAULT, ids=case_name)
def test_a_step_agrees_with_one_process(method: Method, layout: Layout, quick: Path) -> None:
    check_case(quick, method, layout)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "layout"), SLOW, ids=case_name)
def test_every_method_in_every_layout_agrees_with_one_process(method: Method, layout: Layout, matrix: Path) -> None:
    check_case(matrix, method, layout)


def test_without_critics_no_critic_has_groups_weights_or_metrics(quick: Path) -> None:
    for _, facts in results(quick, METHODS[0], LAYOUTS[0]):
        assert facts["roles"] == ["actor"]
        assert not any("critic" in name or "value" in name for name in facts)


def test_what_nobody_reads_is_not_scored_but_measured_on_the_way(quick: Path) -> None:
    by_name = {m.name: m for m in METHODS}
    scored, facts = read(quick / "grpo-dp4-small" / "rank-0")[0], results(quick, by_name["asympo"], LAYOUTS[1])
    first = mini_batches(BATCH.num_trajectories, MINI, seed=SEED, step=STEP, epoch=0)[0]
    mask = BATCH.loss_mask & of_trajectories(BATCH, first)
    difference = (scored["old_logprobs"] - BATCH.rollout_logprobs)[mask].double()
    for _, own in facts:
        assert own["scored"] == []
        assert own["mismatch_mean"] == pytest.approx(float(difference.abs().mean()), rel=1e-5)
        k3 = float((torch.expm1(difference) - difference).mean())
        assert own["mismatch_k3_kl"] == pytest.approx(k3, rel=1e-4)
        assert own["entropy"] > 0 and own["clip_fraction"] == 0


@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=case_name)
@pytest.mark.parametrize("name", ["vapo", "kl-reward", "naive-ensemble"])
def test_explained_variance_is_that_of_fresh_predictions_at_all_first_and_last_tokens(
    name: str, layout: Layout, quick: Path
) -> None:
    _, expected = read(quick / "expected" / name)
    for _, facts in results(quick, next(m for m in METHODS if m.name == name), layout):
        for m, wanted in enumerate(expected["explained"]):
            found = [facts[f"explained_variance{place}/critic_{m}"] for place in ("", "_first", "_last")]
            assert found == pytest.approx(wanted, rel=1e-3, abs=1e-4)


def test_the_positive_example_loss_is_logged(quick: Path) -> None:
    _, facts = results(quick, next(m for m in METHODS if m.name == "vapo"), LAYOUTS[0])[0]
    assert facts["loss/positive_nll"] > 0
