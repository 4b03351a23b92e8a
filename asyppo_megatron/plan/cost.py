"""Work of every phase of a step, and the time it should take; estimates from stated figures, nothing is measured."""

from __future__ import annotations

from dataclasses import dataclass

from asyppo_megatron.config import Config, RoleConfig
from asyppo_megatron.models.spec import ModelSpec
from asyppo_megatron.plan.hardware import (
    DECODE_SHARE,
    FORWARD_SHARE,
    SYNC_SHARE,
    TRAIN_SHARE,
    Accelerator,
)
from asyppo_megatron.plan.memory import engine_memory
from asyppo_megatron.plan.parameters import model_elements


@dataclass(frozen=True)
class Phase:
    """One phase of a step.

    Attributes:
        flops: over all GPUs.
        bytes: read from memory (generation) or sent (weight sync), over all GPUs.
        seconds: expected.
        before_exchange: it may overlap with other roles' phases on other ranks, up to the exchange.
    """

    name: str
    flops: float
    bytes: float
    seconds: float
    ranks: tuple[int, ...]
    before_exchange: bool = False


def forward_flops(spec: ModelSpec, tokens: float, length: float, role: str) -> float:
    """Two operations a weight and token (the embedding is looked up), and causal attention over `length` tokens."""
    weights = model_elements(spec, "critic" if role == "critic" else "actor")
    if role == "critic" or not spec.tied:
        weights -= spec.vocab_size * spec.hidden_size
    attention = 4 * spec.num_layers * spec.num_heads * spec.head_dim * length / 2
    return tokens * (2.0 * weights + attention)


def phases(config: Config, specs: dict[str, ModelSpec], gpu: Accelerator, *, response_tokens: float) -> list[Phase]:
    """Every phase of a synchronous step.

    Args:
        response_tokens: mean length of a response; prompts count with a quarter of their limit.
    """
    prompt = config.rollout.max_prompt_tokens / 4
    length = prompt + response_tokens
    tokens = config.batch_size * length
    found = [_generation(config, specs["actor"], gpu, prompt, response_tokens)]
    share = 1.0 / max(config.num_critics, 1)

    def add(name: str, role: RoleConfig, flops: float, speed: float, before: bool) -> None:
        seconds = flops / (len(role.ranks) * gpu.flops * speed)
        found.append(Phase(name, flops, 0.0, seconds, role.ranks, before))

    for name, role in config.roles().items():
        kind = "critic" if name.startswith("critic") else "actor"
        once = forward_flops(specs[name], tokens, length, kind)
        again = 1 if role.recompute == "full" else 0
        part = (share if config.ppo.critic_data == "disjoint" else 1.0) if kind == "critic" else 1.0
        bubble = 1 + 0.05 * (role.layout.pp - 1)
        update = once * (3 + again) * role.epochs * part * bubble
        if kind == "critic":
            add(f"{name} update", role, update, TRAIN_SHARE, True)
            add(f"{name} values", role, once * bubble, FORWARD_SHARE, True)
        else:
            add("actor logprobs", role, once * bubble, FORWARD_SHARE, True)
            if config.uses_reference:
                add("reference logprobs", role, once * bubble, FORWARD_SHARE, True)
            add("actor update", role, update, TRAIN_SHARE, False)
    size = 2.0 * model_elements(specs["actor"])
    found.append(Phase("weight sync", 0.0, size, size / (gpu.link * SYNC_SHARE), config.actor.ranks))
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
    return Phase("generation", flops, read * count, seconds, ())


def step_seconds(found: list[Phase]) -> float:
    """Expected time of a step: up to the exchange ranks work side by side, everything else is in turn."""
    busy: dict[int, float] = {}
    for phase in found:
        for rank in phase.ranks if phase.before_exchange else ():
            busy[rank] = busy.get(rank, 0.0) + phase.seconds
    return max(busy.values(), default=0.0) + sum(p.seconds for p in found if not p.before_exchange)
