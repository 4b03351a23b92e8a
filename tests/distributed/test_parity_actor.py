"""The actor in every layout agrees with Hugging Face + `ppo/` in one process: loss, gradients, weights after a step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_files import TIED_COPY, counterpart, part, read, worst_gradient, worst_update, write
from parity_models import ACTOR, make_batch, save_model
from parity_reference import Policy, Trainer, train_policy
from parity_world import run_forked
from safetensors.torch import load_file, save_file

from asyppo_megatron.config import ActorConfig, LayoutConfig, OptimizerConfig, PPOConfig
from asyppo_megatron.packing import mini_batches
from asyppo_megatron.types import Targets

GRADIENT, UPDATE = 1e-5, 1e-3
RANKS = 4
SEED, STEP, TEMPERATURE = 7, 3, 0.8
PPO = PPOConfig(entropy_coef=0.05)
# Clips: the norm is above 1. eps: so that an element whose gradient is rounding noise does not get a full step.
OPTIMIZER = {"lr": 1e-3, "weight_decay": 0.1, "clip_grad": 0.05, "eps": 1e-7}
WHOLE, SMALL = 4096, 24  # tokens of a micro-batch: everything, or two or three sequences
BATCH = make_batch(groups=4, responses=4, seed=1, step=STEP)
REFERENCES = ("whole", "halves")  # one step of all responses; two epochs of two mini-batches


@dataclass(frozen=True)
class Case:
    """One layout of the actor."""

    name: str
    ranks: tuple[int, ...]
    tied: bool
    tp: int = 1
    pp: int = 1
    cp: int = 1
    sp: bool | None = None
    distributed: bool = True
    recompute: str = "none"
    max_tokens: int = WHOLE
    precision: str = "fp32"
    reference: str = "whole"
    fused: bool = False  # the head that keeps no logits, 7 tokens at a time
    kernels: str = "auto"  # "triton" under its interpreter, in tests/kernels


CASES = [
    Case("tp1", (0,), tied=True),
    Case("tp1-small-micro-batches", (0,), tied=True, max_tokens=SMALL),
    Case("tp2-no-sp", (0, 1), tied=False, tp=2, sp=False),
    Case("tp2", (1, 2), tied=True, tp=2),
    Case("pp2", (2, 3), tied=True, pp=2),
    Case("tp2-pp2-sp", (0, 1, 2, 3), tied=True, tp=2, pp=2),
    Case("tp2-pp2-sp-small-micro-batches", (0, 1, 2, 3), tied=True, tp=2, pp=2, max_tokens=SMALL),
    Case("tp2-pp2-sp-untied-recompute", (0, 1, 2, 3), tied=False, tp=2, pp=2, recompute="full"),
    Case("dp2", (0, 3), tied=True),
    Case("dp2-small-micro-batches", (0, 3), tied=True, max_tokens=SMALL),
    Case("tp2-dp2", (0, 1, 2, 3), tied=True, tp=2),
    Case("tp2-dp2-plain-optimizer", (0, 1, 2, 3), tied=False, tp=2, distributed=False),
    Case("tp2-pp2-sp-two-epochs-of-halves", (0, 1, 2, 3), tied=True, tp=2, pp=2, reference="halves"),
    Case("dp2-two-epochs-of-halves", (0, 1), tied=True, reference="halves", max_tokens=SMALL),
    Case("cp2", (1, 3), tied=True, cp=2),
    Case("cp2-dp2-small-micro-batches", (0, 1, 2, 3), tied=True, cp=2, max_tokens=SMALL),
    Case("tp2-cp2-sp-untied-recompute", (0, 1, 2, 3), tied=False, tp=2, cp=2, recompute="full"),
    Case("cp2-two-epochs-of-halves", (0, 1), tied=True, cp=2, reference="halves", max_tokens=SMALL),
    Case("fused", (0,), tied=True, fused=True, max_tokens=SMALL),
    Case("fused-tp2-no-sp", (0, 1), tied=False, tp=2, sp=False, fused=True),
    Case("fused-tp2-pp2-sp", (0, 1, 2, 3), tied=True, tp=2, pp=2, fused=True, max_tokens=SMALL),
    Case("fused-tp2-cp2-sp", (0, 1, 2, 3), tied=True, tp=2, cp=2, fused=True, max_tokens=SMALL),
    Case("fused-tp2-dp2-plain-optimizer", (0, 1, 2, 3), tied=True, tp=2, distributed=False, fused=True),
    Case("fused-two-epochs-of-halves", (0, 1), tied=False, reference="halves", fused=True, max_tokens=SMALL),
]
BF16 = [
    Case("bf16-tp2", (0, 1), tied=True, tp=2, precision="bf16"),
    Case("bf16-tp2-pp2-sp", (0, 1, 2, 3), tied=True, tp=2, pp=2, precision="bf16"),
    Case("bf16-dp2", (0, 1), tied=True, precision="bf16"),
    Case("bf16-fused-tp2-cp2-sp", (0, 1, 2, 3), tied=True, tp=2, cp=2, precision="bf16", fused=True),
]
MATRIX = [
    Case(f"tp{tp}-pp{pp}-cp{cp}-{tied=}-{distributed=}-{recompute}-{tokens}", (0, 1, 2, 3), tied, tp, pp, cp,
         distributed=distributed, recompute=recompute, max_tokens=tokens)
    for tp, pp, cp in [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 4, 1), (1, 1, 2), (2, 1, 2), (1, 2, 2),
                       (1, 1, 4)]
    for tied in (True, False)
    for distributed in (True, False)
    for recompute in ("none", "selective", "full")
    for tokens in (WHOLE, SMALL)
    if cp == 1 or recompute != "selective"
]  # fmt: skip
FUSED_MATRIX = [
    Case(f"fused-tp{tp}-pp{pp}-cp{cp}-{tied=}-{distributed=}-{sp=}-{tokens}", (0, 1, 2, 3), tied, tp, pp, cp, sp,
         distributed=distributed, max_tokens=tokens, fused=True)
    for tp, pp, cp, sp in [(2, 1, 1, True), (2, 1, 1, False), (2, 2, 1, False), (1, 4, 1, None), (2, 1, 2, True),
                           (1, 2, 2, None)]
    for tied in (True, False)
    for distributed in (True, False)
    for tokens in (WHOLE, SMALL)
]  # fmt: skip


def model_path(directory: Path, tied: bool) -> Path:
    return directory / ("tied" if tied else "untied")


def targets_from(directory: Path, tied: bool) -> Targets:
    tensors = load_file(directory / f"targets-{'tied' if tied else 'untied'}.safetensors")
    return Targets(**{n: t.bool() if n.endswith("_mask") else t for n, t in tensors.items()})


def make_reference(directory: Path) -> None:
    """Models, targets, and what one process makes of them."""
    for tied in (True, False):
        save_model(model_path(directory, tied), ACTOR, tied=tied, seed=int(tied))
        policy = Policy(model_path(directory, tied), TEMPERATURE)
        with torch.no_grad():
            logprobs, entropies = policy.scores(BATCH)
        torch.manual_seed(5)
        mask = BATCH.loss_mask
        targets = {
            "old_logprobs": torch.where(mask, logprobs + 0.2 * torch.randn_like(logprobs), 0),  # some ratios clip
            "advantages": torch.where(mask, torch.randn_like(logprobs), 0),
            "returns": torch.zeros_like(logprobs),
            "advantage_mask": (mask & (torch.rand_like(logprobs) > 0.2)).byte(),
            "entropy_mask": (mask & (torch.rand_like(logprobs) > 0.2)).byte(),
        }
        save_file(targets, directory / f"targets-{'tied' if tied else 'untied'}.safetensors")
        for name in REFERENCES:
            write_reference(directory, tied, name, logprobs, entropies)


def write_reference(directory: Path, tied: bool, name: str, logprobs: torch.Tensor, entropies: torch.Tensor) -> None:
    policy = Policy(model_path(directory, tied), TEMPERATURE)
    trainer = Trainer(policy.named(), OptimizerConfig(**OPTIMIZER))
    size, epochs = (BATCH.num_trajectories, 1) if name == "whole" else (BATCH.num_trajectories // 2, 2)
    parts = [
        chosen
        for epoch in range(epochs)
        for chosen in mini_batches(BATCH.num_trajectories, size, seed=SEED, step=STEP, epoch=epoch)
    ]
    train_policy(policy, trainer, BATCH, targets_from(directory, tied), PPO, parts)
    tensors = {f"grad/{n}": g for n, g in trainer.gradients.items()}
    tensors |= {f"update/{n}": u for n, u in trainer.updates().items()}
    tensors |= {"old_logprobs": torch.where(BATCH.loss_mask, logprobs, 0)}
    facts = {
        "loss": sum(trainer.losses),
        "norms": trainer.norms,
        "entropy": float(entropies[BATCH.loss_mask].double().sum()),
    }
    write(directory / f"reference-{tied}-{name}", tensors, facts)


def run_cases(device: torch.device, store: Any, directory: Path, cases: list[Case]) -> None:
    """Every layout in turn, in one world."""
    import torch.distributed as dist

    from asyppo_megatron.parallel.layout import ParallelLayout
    from asyppo_megatron.parallel.process_groups import GroupRegistry, build_groups
    from asyppo_megatron.roles.role import skip_optimizer_construction

    registry = GroupRegistry()
    for case in cases:
        groups = build_groups(ParallelLayout(case.ranks, tp=case.tp, pp=case.pp, cp=case.cp), registry)
        if groups is None:
            skip_optimizer_construction()
        else:
            tensors, facts = run_case(case, directory, groups)
            write(directory / case.name / f"rank-{dist.get_rank()}", tensors, facts)


def run_case(case: Case, directory: Path, groups: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    from parity_roles import Watch

    from asyppo_megatron.convert.load import load_hf
    from asyppo_megatron.kernels.policy import choose
    from asyppo_megatron.models.spec import ModelSpec
    from asyppo_megatron.roles.actor import SUMS, Actor
    from asyppo_megatron.roles.role import Role

    path = model_path(directory, case.tied)
    halves = {"mini_batch_size": BATCH.num_trajectories // 2, "epochs": 2} if case.reference == "halves" else {}
    config = ActorConfig(
        model=path,
        ranks=case.ranks,
        layout=LayoutConfig(tp=case.tp, pp=case.pp, cp=case.cp, sequence_parallel=case.sp),
        optimizer=OptimizerConfig(**OPTIMIZER, distributed=case.distributed),
        precision=case.precision,
        recompute=case.recompute,
        max_tokens_per_micro_batch=case.max_tokens,
        fused_head=case.fused,
        fused_head_chunk=7,
        **halves,
    )
    role = Role("actor", config, ModelSpec.from_hf(path), groups, value_head=False, total_updates=4)
    load_hf(role.module, role.spec, path, tp_rank=groups.at.tp, tp_size=case.tp)
    role.weights_changed()
    operators = choose(role.device, case.kernels)
    actor = Actor(role, config, PPO, operators, temperature=TEMPERATURE, seed=SEED, max_response_tokens=16)
    watch = Watch(role)
    tensors = actor.evaluate(BATCH)
    packs = role.runner.packs(BATCH, torch.arange(BATCH.num_trajectories))
    actor.update(BATCH, targets_from(directory, case.tied))
    facts = dict(zip(SUMS, actor.sums.tolist(), strict=True))
    facts |= {"norms": watch.norms, "packs": len(packs), "main_grad": sorted(watch.dtypes), "lead": groups.is_lead}
    facts["weights"] = sorted({str(p.dtype) for p in role.module.parameters()})
    return tensors | watch.tensors(), facts


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("actor")
    run_forked(0, path, make_reference, path)
    return path


@pytest.fixture(scope="module")
def quick(directory: Path) -> Path:
    run_forked(RANKS, directory, run_cases, directory, [*CASES, *BF16])
    return directory


@pytest.fixture(scope="module")
def matrix(directory: Path) -> Path:
    run_forked(RANKS, directory, run_cases, directory, MATRIX, timeout_s=2400)
    return directory


@pytest.fixture(scope="module")
def fused_matrix(directory: Path) -> Path:
    run_forked(RANKS, directory, run_cases, directory, FUSED_MATRIX, timeout_s=2400)
    return directory


def results(directory: Path, case: Case) -> list[tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    return [read(directory / case.name / f"rank-{rank}") for rank in case.ranks]


def reference(directory: Path, case: Case) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return read(directory / f"reference-{case.tied}-{case.reference}")


def check_case(directory: Path, case: Case) -> None:
    expected, facts = reference(directory, case)
    ranks = results(directory, case)
    assert sum(f["loss"] for _, f in ranks) == pytest.approx(facts["loss"], rel=1e-5, abs=1e-6)
    assert sum(f["entropy"] for _, f in ranks) == pytest.approx(facts["entropy"], rel=1e-5)
    logprobs = sum(t["old_logprobs"] for t, _ in ranks if "old_logprobs" in t)
    torch.testing.assert_close(logprobs, expected["old_logprobs"], rtol=0, atol=1e-5)
    for tensors, own in ranks:
        assert own["norms"] == pytest.approx(facts["norms"], rel=1e-4)
        deviation, name = worst_gradient(part(tensors, "grad"), part(expected, "grad"))
        assert deviation <= GRADIENT, f"gradient of {name}: off by {deviation:.1e} of its maximum"
        distance, name = worst_update(part(tensors, "update"), part(expected, "update"))
        assert distance <= UPDATE, f"update of {name}: off by {distance:.1e} in relative L2"
    names = {n.removeprefix(TIED_COPY) for tensors, _ in ranks for n in part(tensors, "grad")}
    assert names == part(expected, "grad").keys()  # every tensor was compared, on some stage


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_loss_logprobs_gradients_and_update_agree_with_one_process(case: Case, quick: Path) -> None:
    check_case(quick, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MATRIX, ids=lambda c: c.name)
def test_every_combination_of_layouts_agrees_with_one_process(case: Case, matrix: Path) -> None:
    check_case(matrix, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", FUSED_MATRIX, ids=lambda c: c.name)
def test_the_head_without_logits_agrees_with_one_process_in_every_layout(case: Case, fused_matrix: Path) -> None:
    check_case(fused_matrix, case)


def test_the_reference_clips_both_its_ratios_and_its_gradient(quick: Path) -> None:
    _, facts = reference(quick, CASES[0])
    _, own = results(quick, CASES[0])[0]
    assert min(facts["norms"]) > OPTIMIZER["clip_grad"]
    assert 0.02 < own["clipped"] / own["update_tokens"] < 0.5


@pytest.mark.parametrize("layout", ["tp1", "tp2-pp2-sp", "dp2"])
def test_many_small_micro_batches_train_like_one(layout: str, quick: Path) -> None:
    by_name = {c.name: c for c in CASES}
    one, many = by_name[layout], by_name[f"{layout}-small-micro-batches"]
    for (whole, whole_facts), (cut, cut_facts) in zip(results(quick, one), results(quick, many), strict=True):
        assert whole_facts["packs"] == 1 and cut_facts["packs"] >= 5
        assert worst_gradient(part(cut, "grad"), part(whole, "grad"))[0] <= GRADIENT
        assert worst_update(part(cut, "update"), part(whole, "update"))[0] <= UPDATE


@pytest.mark.parametrize("case", [c for c in CASES if c.tied and c.pp > 1], ids=lambda c: c.name)
def test_both_ends_of_a_tied_pipeline_hold_the_same_embedding(case: Case, quick: Path) -> None:
    found: dict[str, list[torch.Tensor]] = {}
    for tensors, _ in results(quick, case):
        for name, tensor in tensors.items():
            if "embed_tokens" in name:
                found.setdefault(name.split("/")[0], []).append(tensor)
    assert [len(tensors) for tensors in found.values()] == [len(case.ranks)] * 2
    for tensors in found.values():
        assert all(torch.equal(t, tensors[0]) for t in tensors)


@pytest.mark.parametrize("case", BF16, ids=lambda c: c.name)
def test_bf16_weights_train_with_fp32_gradients_close_to_fp32(case: Case, quick: Path) -> None:
    expected, facts = reference(quick, case)
    ranks = results(quick, case)
    assert sum(f["loss"] for _, f in ranks) == pytest.approx(facts["loss"], abs=0.05)
    for tensors, own in ranks:
        assert own["weights"] == ["torch.bfloat16"]
        assert own["main_grad"] == ["torch.float32"]
        assert own["norms"] == pytest.approx(facts["norms"], rel=0.1)
        gradients, wanted = part(tensors, "grad"), part(expected, "grad")
        for name, gradient in gradients.items():
            alike = torch.cosine_similarity(gradient.flatten(), counterpart(name, wanted).flatten(), dim=0)
            assert alike > 0.95, name
        assert any(update.abs().max() > 0 for update in part(tensors, "update").values())
