"""One critic and k = h = beta = 0: what the roles train on is the PPO written out here, to the bit.

The models are real; their logprobs and values go in, and the losses, their gradients and the targets that the roles
made of them are compared with `torch.equal`.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_files import part, read, write
from parity_models import ACTOR, CRITIC, make_batch, save_model
from parity_world import run_forked

from asyppo_megatron.config import Config

BATCH = make_batch(groups=3, responses=4, seed=4, step=1)
GAMMA, LAMBDA, CLIP = 0.97, 0.9, 0.2
EPOCHS = 2  # from the second mini-batch on the ratios are not 1
MINI_BATCH = 6


def make_config(directory: Path) -> Config:
    shared = {
        "precision": "fp32",
        "max_tokens_per_micro_batch": 40,
        "mini_batch_size": MINI_BATCH,
        "epochs": EPOCHS,
        "optimizer": {"lr": 1e-2, "clip_grad": 0.0},
    }
    return Config(
        run_dir=directory / "run",
        num_steps=1,
        actor={"model": directory / "actor", **shared},
        critics=[{"model": directory / "critic", **shared}],
        ppo={
            "gamma": GAMMA, "lam": LAMBDA, "clip_low": CLIP, "clip_high": CLIP, "order": "values_first",
            "advantage_mask_fraction": 0.0, "entropy_mask_fraction": 0.0, "entropy_coef": 0.0,
        },
        rollout={"prompts_per_step": 3, "responses_per_prompt": 4},
        data={"train": directory / "none.jsonl"},
    )  # fmt: skip


# --- the role code, with a look at what goes into the losses


class Recorder:
    """Stands in for a loss function: calls it, and keeps its inputs, its sum and the gradient of its first input."""

    def __init__(self, loss: Any, tensors: dict[str, torch.Tensor], name: str):
        self.loss, self.tensors, self.name, self.calls = loss, tensors, name, 0

    def __call__(self, scores: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        prefix = f"{self.name}-{self.calls}"
        self.calls += 1
        self.tensors[f"{prefix}/scores"] = scores.detach().clone()
        scores.register_hook(lambda grad: self.tensors.update({f"{prefix}/gradient": grad.clone()}))
        found = self.loss(scores, *args, **kwargs)
        self.tensors[f"{prefix}/sum"] = found[0].detach().clone()
        return found


def run_role_code(device: torch.device, store: Any, directory: Path) -> None:
    from asyppo_megatron.observability.timing import PhaseTimer
    from asyppo_megatron.roles import critic as critic_module
    from asyppo_megatron.world import World

    save_model(directory / "actor", ACTOR, tied=True, seed=1)
    save_model(directory / "critic", CRITIC, tied=True, seed=2)
    world = World(make_config(directory), device, store, PhaseTimer(device))
    scores = world.exchange(BATCH, world.evaluate(BATCH))
    targets = world.targets(BATCH, scores)
    tensors = {"old_logprobs": scores.old_logprobs, "values": scores.values[0]}
    tensors |= {name: getattr(targets, name) for name in ("advantages", "returns", "advantage_mask")}
    head = world.actor.head
    policy = Recorder(head.operators.policy_loss, tensors, "actor")
    head.operators = replace(head.operators, policy_loss=policy)
    value = critic_module.value_loss = Recorder(critic_module.value_loss, tensors, "critic")
    steps: dict[str, list[int]] = {"actor": [], "critic_0": []}
    for name, role in world.roles.items():
        record_packs(role, name.removesuffix("_0"), tensors, steps[name])
    world.update(BATCH, targets, scores)
    write(directory / "roles", tensors, {"actor": policy.calls, "critic": value.calls, "steps": steps})


def record_packs(role: Any, name: str, tensors: dict[str, torch.Tensor], steps: list[int]) -> None:
    """Keep, for every call of the loss, the positions of its pack and the trajectories of its mini-batch."""
    make = role.runner.packs

    def packs(batch: Any, chosen: torch.Tensor) -> Any:
        made = make(batch, chosen)
        for pack in made:
            number = sum(steps)
            steps.append(1)
            tensors[f"{name}-{number}/index"] = pack.index.clone()
            tensors[f"{name}-{number}/trajectories"] = pack.plan.trajectories.clone()
            tensors[f"{name}-{number}/chosen"] = chosen.clone()
        return made

    role.runner.packs = packs


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    directory = tmp_path_factory.mktemp("ppo")
    run_forked(1, directory, run_role_code, directory)
    return read(directory / "roles")


# --- PPO, written out


def written_out_gae(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns [T], token by token in float64: G = r + gamma ((1 - lambda) V' + lambda G')."""
    advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
    cu = BATCH.cu_seqlens.tolist()
    for n, (start, end) in enumerate(pairwise(cu)):
        generated = [t for t in range(start, end) if BATCH.loss_mask[t]]
        following_return = following_value = 0.0
        for t in reversed(generated):
            reward = BATCH.rewards[n].item() if t == generated[-1] else 0.0
            mixed = (1 - LAMBDA) * following_value + LAMBDA * following_return
            following_return, following_value = reward + GAMMA * mixed, values[t].item()
            returns[t] = following_return
            advantages[t] = returns[t] - values[t]
    return advantages, returns


def written_out_ppo(logprobs: torch.Tensor, tensors: dict[str, torch.Tensor], call: str) -> torch.Tensor:
    """-min(r A, clip(r) A): mean over the tokens of a response, summed over the pack's responses."""
    index, advantages = tensors[f"{call}/index"], tensors["advantages"]
    mask = BATCH.loss_mask[index]
    a = advantages[index]
    ratio = torch.exp(torch.where(mask, logprobs - tensors["old_logprobs"][index], 0.0))
    loss = -torch.minimum(ratio * a, ratio.clamp(1 - CLIP, 1 + CLIP) * a)
    sizes = BATCH.cu_seqlens.diff().long()[tensors[f"{call}/trajectories"]]
    response_tokens = torch.cat([m.sum().repeat(len(m)) for m in mask.split(sizes.tolist())])
    return torch.where(mask, loss / response_tokens, 0.0).sum()


def written_out_value_loss(values: torch.Tensor, tensors: dict[str, torch.Tensor], call: str) -> torch.Tensor:
    """Sum of (V - R)^2 over the pack's generated tokens."""
    index = tensors[f"{call}/index"]
    errors = values - tensors["returns"][index]
    return torch.where(BATCH.loss_mask[index], errors * errors, 0.0).sum()


# --- the tests


def test_targets_are_those_of_ppo_to_the_bit(recorded: tuple[dict[str, torch.Tensor], dict[str, Any]]) -> None:
    tensors, _ = recorded
    advantages, returns = written_out_gae(tensors["values"])
    assert advantages.abs().max() > 0.1
    assert torch.equal(tensors["advantages"], advantages)
    assert torch.equal(tensors["returns"], returns)
    assert torch.equal(tensors["advantage_mask"], BATCH.loss_mask)  # no token is left out


def test_policy_losses_and_their_gradients_are_those_of_ppo_to_the_bit(
    recorded: tuple[dict[str, torch.Tensor], dict[str, Any]],
) -> None:
    tensors, facts = recorded
    assert facts["actor"] >= 8
    clipped = 0
    for number in range(facts["actor"]):
        call = f"actor-{number}"
        own = part(tensors, call)
        logprobs = own["scores"].clone().requires_grad_()
        loss = written_out_ppo(logprobs, tensors, call)
        (loss / len(own["chosen"])).backward()
        assert torch.equal(own["sum"], loss)
        assert torch.equal(own["gradient"], logprobs.grad)
        clipped += int(((logprobs.grad == 0) & BATCH.loss_mask[own["index"]]).sum())
    assert clipped > 0  # the clip was at work


def test_value_losses_and_their_gradients_are_those_of_ppo_to_the_bit(
    recorded: tuple[dict[str, torch.Tensor], dict[str, Any]],
) -> None:
    tensors, facts = recorded
    assert facts["critic"] >= 8
    for number in range(facts["critic"]):
        call = f"critic-{number}"
        own = part(tensors, call)
        values = own["scores"].clone().requires_grad_()
        loss = written_out_value_loss(values, tensors, call)
        chosen = torch.isin(torch.arange(BATCH.num_trajectories), own["chosen"])
        count = (BATCH.loss_mask & chosen.repeat_interleave(BATCH.cu_seqlens.diff().long())).sum()
        (loss / count).backward()
        assert torch.equal(own["sum"], loss)
        assert torch.equal(own["gradient"], values.grad)


def test_the_single_critic_trains_on_every_response(
    recorded: tuple[dict[str, torch.Tensor], dict[str, Any]],
) -> None:
    tensors, facts = recorded
    seen = torch.cat([tensors[f"critic-{number}/trajectories"] for number in range(facts["critic"])])
    assert torch.equal(seen.sort().values, torch.arange(BATCH.num_trajectories).repeat_interleave(EPOCHS))
