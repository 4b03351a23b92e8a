"""What a run of several ranks does when a number goes bad on one of them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_files import read, write
from parity_models import ACTOR, CRITIC, save_model
from parity_world import run_forked

from asyppo_megatron.config import Config

RANKS, BAD_STEP = 4, 1
# Which role goes bad, on which rank, and the rank that holds its outputs, where that shows: a single critic, the first
# stage of a critic's pipeline, half of the actor.
BAD = {"critic": ("critic_1", 3, 3), "first-stage": ("critic_0", 2, 3), "actor": ("actor", 1, 0)}


def make_config(directory: Path, case: str) -> Config:
    two_stages = case == "first-stage"
    ranks = ("2-3", "1") if two_stages else ("2", "3")
    return Config(
        run_dir=directory / case,
        num_steps=3,
        actor={"model": directory / "actor", "ranks": "0-1", "layout": {"tp": 2}, "precision": "fp32"},
        critics=[
            {"model": directory / "critic", "ranks": r, "layout": {"pp": 2 if "-" in r else 1}, "precision": "fp32"}
            for r in ranks
        ],
        rollout={"prompts_per_step": 3, "responses_per_prompt": 4},
        checkpoint={"every": 1},
        data={"train": directory / "none.jsonl"},
    )


def contents(directory: Path) -> dict[str, str]:
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def run_until_bad(device: torch.device, store: Any, directory: Path) -> None:
    """Weights of one role become NaN on one rank before the second step."""
    import torch.distributed as dist
    from parity_loop import build_run

    from asyppo_megatron.train import train
    from asyppo_megatron.world import NonFiniteError

    if dist.get_rank() == 0:
        save_model(directory / "actor", ACTOR, tied=True, seed=1)
        save_model(directory / "critic", CRITIC, tied=True, seed=2)
    dist.barrier()
    for case, (role, bad_rank, _) in BAD.items():
        config = make_config(directory, case)
        run = build_run(config, device, store)
        facts: dict[str, Any] = {}

        def poison(step: int, run: Any = run, role: str = role, bad_rank: int = bad_rank, facts: Any = facts) -> None:
            if step != BAD_STEP:
                return
            run.checkpoints.finish(wait=True)
            facts["before"] = contents(run.config.run_dir / "checkpoints")
            if dist.get_rank() == bad_rank:
                with torch.no_grad():
                    next(run.world.roles[role].module.parameters()).fill_(torch.nan)
            dist.barrier()

        run.source.before = poison
        try:
            train(run, 0)
        except NonFiniteError as e:
            facts["error"] = str(e)
        run.checkpoints.close()
        dist.barrier()
        facts["after"] = contents(config.run_dir / "checkpoints")
        facts["weights"] = sorted(p.name for p in (config.run_dir / "weights").iterdir())
        again = build_run(config, device, store)
        facts["resumed"] = again.checkpoints.load(again.checkpoints.latest())["step"]
        loaded = [p for role in again.world.roles.values() for p in role.module.parameters()]
        facts["finite"] = all(bool(p.isfinite().all()) for p in loaded)
        again.checkpoints.close()
        write(directory / case / f"rank-{dist.get_rank()}", {}, facts)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("errors")
    run_forked(RANKS, path, run_until_bad, path)
    return path


@pytest.mark.parametrize("case", BAD)
def test_a_nan_stops_every_rank_and_names_step_role_and_rank(case: str, directory: Path) -> None:
    role, _, shows_on = BAD[case]
    messages = {read(directory / case / f"rank-{rank}")[1]["error"] for rank in range(RANKS)}
    (message,) = messages
    assert f"step {BAD_STEP + 1}: " in message
    assert "NaN or infinite" in message
    assert f"{role} on rank {shows_on}" in message
    innocent = {"critic_0", "critic_1"} - {role}
    assert not any(name in message for name in innocent)


@pytest.mark.parametrize("case", BAD)
def test_after_a_nan_the_last_checkpoint_is_intact_and_nothing_was_pushed(case: str, directory: Path) -> None:
    for rank in range(RANKS):
        _, facts = read(directory / case / f"rank-{rank}")
        assert facts["before"] and facts["after"] == facts["before"]
        assert facts["weights"] == [f"v{BAD_STEP:08d}"]
        assert facts["resumed"] == BAD_STEP and facts["finite"]
