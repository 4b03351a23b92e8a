"""Which GPU is whose: names that ranks and node agents give the same device."""

from __future__ import annotations

import os

import torch

from asyppo_megatron.config import Config
from asyppo_megatron.rollout.agents import AgentClient, agent_urls, node_name


def own_gpu(device: torch.device) -> str:
    """This rank's GPU as "node/number", "" on a CPU."""
    if device.type != "cuda":
        return ""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    index = device.index or 0
    return f"{node_name()}/{visible[index] if visible else index}"


def engine_gpus(config: Config) -> dict[str, tuple[str, ...]]:
    """URL -> GPUs of the tp ranks, of every engine that an agent supervises."""
    found = {}
    for url in agent_urls(config) if not config.rollout.sglang.urls else ():
        agent = AgentClient(url)
        node = agent.health()["node"]
        for row in agent.engines():
            found[row["url"].rstrip("/")] = tuple(f"{node}/{gpu}" for gpu in row["gpus"])
    return found
