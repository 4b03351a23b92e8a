"""What `asyppo train` does before and around the ranks."""

from __future__ import annotations

import contextlib

from asyppo_megatron.config import Config, ConfigError
from asyppo_megatron.launch.attempts import attempt
from asyppo_megatron.launch.hang import Watch
from asyppo_megatron.launch.local import EXIT_STOPPED, Place, is_launched, run_ranks
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
    if is_launched():
        _train_rank(config, None)
        return
    gpus = num_gpus()
    if gpus and len(ranks) > gpus:
        found = f"ranks: got {len(ranks)} on a machine of {gpus} GPU(s), need one GPU a rank"
        raise ConfigError([f"{found}; let roles share ranks, or set CUDA_VISIBLE_DEVICES= to run on the CPU"])
    if not gpus:
        # torch and Megatron once, before the ranks are forked. With a GPU every rank imports for itself: Transformer
        # Engine may start CUDA while it is imported.
        import asyppo_megatron.train  # noqa: F401
    board = StatusBoard(len(ranks))
    watch = Watch(board, {name: role.ranks for name, role in config.roles().items()}, config.checkpoint.grace_s)
    counted = attempt(config.run_dir, job) if job and place.node == 0 else contextlib.nullcontext()
    with counted:
        run_ranks(
            config.num_ranks,
            lambda rank: _train_rank(config, board.slot(rank - ranks.start)),
            config.run_dir / "logs",
            place=place,
            watch=watch,
        )


def _train_rank(config: Config, slot: Slot | None) -> None:
    from asyppo_megatron.train import main_rank

    if not main_rank(config, slot):
        raise SystemExit(EXIT_STOPPED)


def num_gpus() -> int:
    """GPUs that this process may use, counted without starting CUDA."""
    import torch

    return torch.cuda.device_count()
