"""Worlds of gloo ranks for the parity tests: import once, fork often. Not a test file.

One fork server of the test session imports torch, Megatron-Core and transformers; every world, and every reference
computation, is a fork of it and starts in milliseconds. Results travel as files that the tests read.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

LIMIT_S = 60.0  # of a collective whose other ranks have failed
IMPORTS = ("torch", "transformers.models.qwen3.modeling_qwen3", "asyppo_megatron.train")


def _rank(work: Callable[..., None], args: tuple[Any, ...], ranks: int, rank: int) -> None:
    from asyppo_megatron.backend import init_distributed, prepare_megatron

    device, store = init_distributed(rank, ranks, rank, LIMIT_S)
    prepare_megatron()
    work(device, store, *args)
    torch.distributed.barrier()


def _process(ranks: int, log: Path, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    """Body of a process that hosts a world (or, with `ranks` 0, does the work itself)."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from importlib import import_module

    for name in IMPORTS:
        import_module(name)  # already there, unless another test file started the fork server first
    if ranks:
        from asyppo_megatron.launch.local import run_ranks

        run_ranks(ranks, partial(_rank, work, args, ranks))
    else:
        torch.set_num_threads(1)
        work(*args)


def run_forked(ranks: int, directory: Path, work: Callable[..., None], *args: Any, timeout_s: float = 300) -> None:
    """Run `work(device, store, *args)` on every rank of a fresh world; with `ranks` 0, `work(*args)` in one process.

    Raises:
        RuntimeError: it failed or took too long; with what it printed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTS))
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / f"{work.__name__}.log"
    process = context.Process(target=_process, args=(ranks, log, work, args))
    process.start()
    process.join(timeout_s)
    if process.is_alive():
        process.terminate()  # it ends its ranks
        process.join(20)
        process.kill()
    if process.exitcode != 0:
        text = log.read_text() if log.exists() else "nothing was printed"
        raise RuntimeError(f"{work.__name__} ended with {process.exitcode}:\n{text[-8000:]}")
