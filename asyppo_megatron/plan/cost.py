"""Work of every phase of a step, and the time it should take; estimates from stated figures, nothing is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from asyppo_megatron.config import Config, RoleConfig
from asyppo_megatron.convert.table import Role
from asyppo_megatron.models.spec import ModelSpec
from asyppo_megatron.plan.hardware import (
    DECODE_SHARE,
    FORWARD_SHARE,
    SYNC_SHARE,
    TRAIN_SHARE,
    Accelerator,
)
from asyppo_megatron.plan.memory import engine_memory
from asyppo_megatron.plan.parameters import kind_of, model_elements

Part = Literal["rollouts", "scores", "updates", "sync"]


@dataclass(frozen=True)
class Phase:
    """One phase of a step.

    Attributes:
        part: of the step, in this order; within one, roles on other ranks work side by side. The exchange and the
            targets lie between scores and updates.
        flops: over all GPUs.
        bytes: read from memory (generation) or sent (weight sync), over all GPUs.
        seconds: expected.
    """

    name: str
    part: Part
    flops: float
    bytes: float
    seconds: float
    ranks: tuple[int, ...]


def forward_flops(spec: ModelSpec, tokens: float, length: float, role: Role) -> float:
    """Two operations a weight and token (the embedding is looked up), and causal attention over `length` tokens."""
    weights = model_elements(spec, role)
    if role == "critic" or not spec.tied:
        weights -= spec.vocab_size * spec.hidden_size
    attention = 4 * spec.num_layers * spec.num_heads * spec.head_dim * length / 2
    return tokens * (2.0 * weights + attention)


def phases(config: Config, specs: dict[str, ModelSpec], gpu: Accelerator, *, response_tokens: float) -> list[Phase]:
    """Every phase of a step in which the policy learns.

    Args:
        response_tokens: mean length of a response; prompts count with a quarter of their limit.
    """
    prompt = config.rollout.max_prompt_tokens / 4
    length = prompt + response_tokens
    tokens = config.batch_size * length
    found = [_generation(config, specs["actor"], gpu, prompt, response_tokens)]

    def add(name: str, part: Part, role: RoleConfig, flops: float, speed: float) -> None:
        seconds = flops / (len(role.ranks) * gpu.flops * speed)
        found.append(Phase(name, part, flops, 0.0, seconds, role.ranks))

    for name, role in config.roles().items():
        kind = kind_of(name)
        is_critic = kind == "critic"
        once = forward_flops(specs[name], tokens, length, kind)
        bubble = 1 + 0.05 * (role.layout.pp - 1)
        passes = 4 if role.recompute == "full" else 3
        share = 1 / config.num_critics if is_critic and config.ppo.critic_data == "disjoint" else 1.0
        update = once * passes * role.epochs * share * bubble
        if is_critic:
            is_first = config.ppo.order == "critics_first"
            add(f"{name} update", "scores" if is_first else "updates", role, update, TRAIN_SHARE)
            add(f"{name} values", "scores", role, once * bubble, FORWARD_SHARE)
            continue
        if config.ppo.needs_old_logprobs:
            add("actor logprobs", "scores", role, once * bubble, FORWARD_SHARE)
        if config.uses_reference:
            other = forward_flops(specs["reference"], tokens, length, "actor")
            add("reference logprobs", "scores", role, other * bubble, FORWARD_SHARE)
        add("actor update", "updates", role, update, TRAIN_SHARE)
    size = 2.0 * model_elements(specs["actor"])
    found.append(Phase("weight sync", "sync", 0.0, size, size / (gpu.link * SYNC_SHARE), config.actor.ranks))
    return found


def _generation(config: Config, spec: ModelSpec, gpu: Accelerator, prompt: float, response: float) -> Phase:
    """Decoding reads all weights once a step and each running sequence's keys and values."""
    engines = config.rollout.sglang
    if engines.placement == "colocated":  # on all of the actor's GPUs, whoever starts them there
        count = max(1, len(config.actor.ranks) // engines.tp)
    else:
        count = engines.num_engines * max(1, len(engines.agents)) if not engines.urls else len(engines.urls)
    gpus = count * engines.tp if config.rollout.engine == "sglang" else 1
    weights = 2.0 * model_elements(spec)
    token = 4.0 * spec.num_layers * spec.num_kv_heads * spec.head_dim
    memory = engine_memory(config, spec, gpu)
    room = memory.tokens if memory is not None else int(gpu.memory / token)
    mean = prompt + response / 2
    running = max(1.0, min(config.batch_size / count, engines.max_concurrency, room / (prompt + response)))
    waves = config.batch_size / count / running
    steps = waves * response
    read = steps * (weights + running * mean * token)
    flops = forward_flops(spec, config.batch_size * (prompt + response), mean, "actor")
    seconds = max(read / (engines.tp * gpu.bandwidth * DECODE_SHARE), flops / (gpus * gpu.flops * FORWARD_SHARE))
    return Phase("generation", "rollouts", flops, read * count, seconds, ())


def part_seconds(found: list[Phase], part: Part) -> float:
    """Expected time of a part: that of its busiest rank."""
    busy: dict[int, float] = {}
    for phase in found:
        for rank in phase.ranks or (-1,):
            busy[rank] = busy.get(rank, 0.0) + (phase.seconds if phase.part == part else 0.0)
    return max(busy.values())


def step_seconds(found: list[Phase], *, is_ahead: bool) -> float:
    """Expected time of a step.

    Args:
        is_ahead: generation of the next batch runs beside training (`rollout.max_staleness` > 0).
    """
    rollouts, scores, updates, sync = (part_seconds(found, part) for part in get_args(Part))
    training = scores + updates
    return (max(rollouts, training) if is_ahead else rollouts + training) + sync
