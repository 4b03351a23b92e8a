"""What `asyppo train` does before and around the ranks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from asyppo_megatron.config import Config, ConfigError
from asyppo_megatron.launch.attempts import attempt
from asyppo_megatron.launch.hang import Watch
from asyppo_megatron.launch.local import EXIT_STOPPED, Place, is_launched, run_ranks
from asyppo_megatron.launch.run_agent import ensure_agent, needs_own_agent
from asyppo_megatron.observability.board import Slot, StatusBoard
from asyppo_megatron.observability.logs import configure_logging
from asyppo_megatron.preflight import check_run


def place_of(nodes: int, node: int, rendezvous: str) -> Place:
    """The place that the options name.

    Raises:
        ValueError: they do not fit together.
    """
    if not 0 <= node < nodes:
        raise ValueError(f"--node: got {node} of {nodes} nodes, need 0 to {nodes - 1}")
    if nodes == 1:
        return Place()
    host, sep, port = rendezvous.rpartition(":")
    if not sep or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"--rendezvous: got {rendezvous!r}, need HOST:PORT of node 0 for {nodes} nodes")
    return Place(nodes, node, host, int(port))


def train_config(config: Config, place: Place | None = None, job: str = "") -> None:
    """Check everything, then train this node's ranks (or be the rank that torchrun started)."""
    check_run(config)
    place = place or Place()
    ranks = place.ranks(config.num_ranks)
    name = "launcher" if place.node == 0 else f"launcher-{place.node:05d}"
    configure_logging(config.run_dir, name, has_progress=False)  # what libraries say while they are imported
    gpus = num_gpus()
    if is_launched():
        with _own_engines(config, gpus, place):
            _train_rank(config, None)
        return
    if gpus and len(ranks) > gpus:
        found = f"ranks: got {len(ranks)} on a machine of {gpus} GPU(s), need one GPU a rank"
        raise ConfigError([f"{found}; let roles share ranks, or set CUDA_VISIBLE_DEVICES= to run on the CPU"])
    if not gpus:
        # torch and Megatron once, before the ranks are forked. With a GPU every rank imports for itself: Transformer
        # Engine may start CUDA while it is imported.
        import asyppo_megatron.train  # noqa: F401
    board = StatusBoard(len(ranks))
    roles = {name: role.ranks for name, role in config.roles().items()}
    watch = Watch(board, roles, config.checkpoint.grace_s, config.collective_timeout_s)
    counted = attempt(config.run_dir, job) if job and place.node == 0 else contextlib.nullcontext()
    with counted, _own_engines(config, gpus, place):
        run_ranks(
            config.num_ranks,
            lambda rank: _train_rank(config, board.slot(rank - ranks.start)),
            config.run_dir / "logs",
            place=place,
            watch=watch,
        )


@contextlib.contextmanager
def _own_engines(config: Config, gpus: int, place: Place) -> Iterator[None]:
    """The agent of this node, where the run generates with SGLang and nobody else provides engines."""
    if place.node != 0 or int(os.environ.get("RANK", "0")) or not needs_own_agent(config):
        yield
        return
    agent = ensure_agent(config, gpus)
    finished = False
    try:
        yield
        finished = True
    finally:
        agent.close(finished)


def _train_rank(config: Config, slot: Slot | None) -> None:
    from asyppo_megatron.train import main_rank

    if not main_rank(config, slot):
        raise SystemExit(EXIT_STOPPED)


def num_gpus() -> int:
    """GPUs that this process may use, counted without starting CUDA."""
    import torch

    return torch.cuda.device_count()
