"""Whether a run fits the nodes that a job was given, and what the job's script must know of it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable
from pathlib import Path

from asyppo_megatron.config import Config, ConfigError
from asyppo_megatron.launch.run_agent import needs_own_agent
from asyppo_megatron.preflight import check_run


def check_allocation(config: Config, nodes: int, gpus_per_node: int | None) -> dict[str, str]:
    """What a job script must know of a run, once it is clear that the run fits its allocation.

    Args:
        gpus_per_node: None where the nodes have none.

    Raises:
        ConfigError: with everything that does not fit, at once.
    """
    errors: list[str] = []
    train_nodes = nodes - _engine_nodes(config, nodes, gpus_per_node)
    if train_nodes < 1:
        errors.append(f"nodes: got {nodes}, need one more for the engines (rollout.sglang.placement separate)")
        train_nodes = nodes
    per_node = -(-config.num_ranks // train_nodes)
    if gpus_per_node is not None and per_node > gpus_per_node:
        need = nodes - train_nodes + (-(-config.num_ranks // gpus_per_node) if gpus_per_node else config.num_ranks)
        errors.append(
            f"GPUs: got {train_nodes} node(s) of {gpus_per_node}, need {per_node} a node for {config.num_ranks} ranks; "
            f"ask for {need} nodes (sbatch --nodes={need}) or let roles share ranks"
        )
    elif config.num_ranks % train_nodes:
        errors.append(
            f"nodes: got {train_nodes} for {config.num_ranks} ranks, need a divisor of {config.num_ranks}; ask for "
            "another number of nodes (sbatch --nodes) or change the roles' ranks"
        )
    try:
        check_run(config)
    except ConfigError as e:
        errors += e.errors
    if not os.access(_existing_parent(config.run_dir), os.W_OK):
        errors.append(
            f"run_dir: {config.run_dir} cannot be written; choose a directory of a file system all nodes share"
        )
    if errors:
        raise ConfigError(errors)
    agent_nodes: Iterable[int] = range(train_nodes, nodes)
    if needs_own_agent(config) and config.rollout.sglang.placement == "colocated":
        agent_nodes = sorted({rank // per_node for rank in config.actor.ranks})
    return {
        "ranks": str(config.num_ranks),
        "ranks_per_node": str(per_node),
        "train_nodes": str(train_nodes),
        "engine": config.rollout.engine,
        "agent_nodes": " ".join(map(str, agent_nodes)),  # where the job is to start node agents
        "run_dir": str(config.run_dir),
    }


def _engine_nodes(config: Config, nodes: int, gpus_per_node: int | None) -> int:
    """Nodes of a job that have engines and no ranks: those that the ranks leave over, at least one."""
    if not needs_own_agent(config) or config.rollout.sglang.placement == "colocated":
        return 0
    return max(nodes - -(-config.num_ranks // gpus_per_node), 1) if gpus_per_node else 1


def shell_lines(facts: dict[str, str]) -> str:
    """`name=value` lines for a shell's `eval`."""
    return "\n".join(f"{name}={shlex.quote(value)}" for name, value in facts.items())


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
