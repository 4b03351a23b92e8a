"""Checks of the engines' section."""

from __future__ import annotations

from urllib.parse import urlsplit

from asyppo_megatron.config.rollout import RolloutConfig, SGLangConfig
from asyppo_megatron.config.run import Config

# Arguments of the server that follow from the configuration, and the key that decides each.
DERIVED_ARGS = {
    "--model-path": "actor.model",
    "--model": "actor.model",
    "--tp-size": "rollout.sglang.tp",
    "--tensor-parallel-size": "rollout.sglang.tp",
    "--tp": "rollout.sglang.tp",
    "--dtype": "rollout.sglang.dtype",
    "--mem-fraction-static": "rollout.sglang.mem_fraction",
    "--context-length": "rollout.sglang.context_length",
    "--max-total-tokens": "rollout.sglang.max_total_tokens",
    "--attention-backend": "rollout.sglang.attention_backend",
    "--max-running-requests": "rollout.sglang.max_concurrency",
    "--enable-memory-saver": "rollout.sglang.placement",
    "--random-seed": "seed",
    "--host": "rollout.sglang.host",
    "--port": "nothing: the agent chooses it",
    "--nccl-port": "nothing: the agent chooses it",
    "--device": "the machine",
    "--base-gpu-id": "rollout.sglang.gpus",
    "--dp-size": "rollout.sglang.num_engines",
    "--data-parallel-size": "rollout.sglang.num_engines",
    "--dp": "rollout.sglang.num_engines",
}


def staleness_errors(config: Config) -> list[str]:
    """What asynchronous rollouts need."""
    rollout, errors = config.rollout, []
    stale = rollout.max_staleness
    if rollout.partial and not stale:
        errors.append("rollout.partial: got true with max_staleness 0, need >= 1: what is carried over is stale")
    if rollout.on_update == "requeue" and rollout.engine == "embedded":
        errors.append("rollout.on_update: got requeue with engine embedded, which can only carry; use sglang or carry")
    if not stale:
        return errors
    if config.ppo.importance != "none":
        errors.append(
            f"ppo.importance: got {config.ppo.importance} with rollout.max_staleness {stale}, need none: old logprobs "
            "are the engine's then, so the policy's ratio carries the mismatch already"
        )
    shares = rollout.engine == "sglang" and rollout.sglang.placement == "colocated"
    if shares and not rollout.partial:
        errors.append(
            f"rollout.max_staleness: got {stale} with rollout.sglang.placement colocated, need engines on devices "
            "without a training role; set placement separate, or rollout.partial, which rests while the ranks train"
        )
    return errors


def offload_errors(config: Config) -> list[str]:
    """Roles move out of a device's memory for the engines that use it in turn with them."""
    rollout = config.rollout
    if rollout.engine == "sglang" and rollout.sglang.placement == "colocated":
        return []
    return [
        f"{name.replace('critic_', 'critics.')}.offload: got {role.offload} without engines that need the memory, need "
        "none; leave it out, or set rollout.sglang.placement colocated"
        for name, role in config.roles().items()
        if role.offload != "none"
    ]


def transport_errors(config: Config) -> list[str]:
    """What the weights' way into the engines needs."""
    sync, rollout = config.weight_sync, config.rollout
    if rollout.engine == "embedded" and sync.transport not in ("auto", "disk"):
        return [
            f"weight_sync.transport: got {sync.transport} with rollout.engine embedded, which reads a directory; set "
            "auto or disk"
        ]
    return []


def engine_errors(rollout: RolloutConfig) -> list[str]:
    """Everything that is wrong in `rollout.sglang` and between it and `rollout`."""
    if rollout.engine != "sglang":
        return []
    engines = rollout.sglang
    errors = _address_errors(engines)
    if engines.gpus is not None:
        need = engines.num_engines * engines.tp
        if len(engines.gpus) != need or min(engines.gpus, default=0) < 0:
            errors.append(
                f"rollout.sglang.gpus: got {list(engines.gpus)}, need {need} numbers >= 0 "
                f"(num_engines {engines.num_engines} x tp {engines.tp}); name each engine's GPUs"
            )
        for start in range(0, len(engines.gpus), engines.tp):
            gpus = engines.gpus[start : start + engines.tp]
            if len(set(gpus)) != len(gpus):
                errors.append(f"rollout.sglang.gpus: got {list(gpus)} for one engine, need distinct GPUs")
    need = rollout.max_prompt_tokens + rollout.max_response_tokens
    if engines.context_length is not None and engines.context_length < need:
        errors.append(
            f"rollout.sglang.context_length: got {engines.context_length}, need at least {need} "
            "(rollout.max_prompt_tokens + max_response_tokens); raise it or leave it out"
        )
    length = engines.context_length or need
    if engines.max_total_tokens is not None and engines.max_total_tokens < length:
        errors.append(
            f"rollout.sglang.max_total_tokens: got {engines.max_total_tokens}, need at least the {length} tokens of "
            "one sequence; raise it or leave it out"
        )
    for argument in engines.extra_args:
        name = argument.partition("=")[0]
        if name in DERIVED_ARGS:
            errors.append(f"rollout.sglang.extra_args: got {name}, which {DERIVED_ARGS[name]} decides; remove it")
    return errors


def _address_errors(engines: SGLangConfig) -> list[str]:
    errors = []
    if engines.urls and engines.agents:
        errors.append("rollout.sglang: got urls and agents, need one of them; remove the other")
    for url in engines.urls:
        if not is_url(url):
            errors.append(f"rollout.sglang.urls: got {url!r}, need http://host:port")
    for agent in engines.agents:
        if "://" in agent and not is_url(agent):
            errors.append(f"rollout.sglang.agents: got {agent!r}, need http://host:port or a file that holds it")
    for key, values in (("urls", engines.urls), ("agents", engines.agents)):
        if len({v.rstrip("/") for v in values}) != len(values):
            errors.append(f"rollout.sglang.{key}: got {list(values)}, need distinct ones; remove the double")
    if engines.urls and engines.placement == "colocated":
        errors.append(
            "rollout.sglang.placement: got colocated with urls, need servers that an agent started with releasable "
            "memory; use agents, or separate"
        )
    return errors


def is_url(text: str) -> bool:
    """Whether it is `http://host:port`."""
    try:
        parts = urlsplit(text)
        return parts.scheme == "http" and bool(parts.hostname) and parts.port is not None and parts.path in ("", "/")
    except ValueError:  # a port that is none
        return False
