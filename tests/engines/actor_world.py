"""A TP2 x PP2 actor on four gloo ranks that tests command from outside. Not a test file."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

LIMIT = timedelta(seconds=120)  # of a collective whose other ranks have failed
ANSWER_S = 240


@dataclass
class Rank:
    """What one rank of the world keeps between commands."""

    model: Any
    spec: Any
    groups: Any
    config: Any
    store: Any
    syncs: dict[str, Any] = field(default_factory=dict)
    targets: dict[str, list[Any]] = field(default_factory=dict)  # of each sync's last push


class ActorWorld:
    """Four ranks; `call` runs a function on all of them at once.

    Args:
        base: Hugging Face directory that the model is built from.
    """

    def __init__(self, base: Path, tp: int = 2, pp: int = 2):
        import torch.distributed as dist

        self.size = tp * pp
        self._store = dist.TCPStore("127.0.0.1", 0, self.size, is_master=True, wait_for_workers=False, timeout=LIMIT)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "asyppo_megatron.models.gpt", "asyppo_megatron.roles.runner"])
        self._pipes, self._processes = [], []
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            args = (rank, tp, pp, self._store.port, base, theirs)
            process = context.Process(target=_rank_main, args=args, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def call(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Results of `function(rank, *args)`; an exception comes back as an instance."""
        for pipe in self._pipes:
            pipe.send((function, args))
        results = []
        for pipe in self._pipes:
            if not pipe.poll(ANSWER_S):
                raise TimeoutError(f"{function.__name__}: a rank did not answer")
            results.append(pipe.recv())
        return results

    def close(self) -> None:
        for pipe in self._pipes:
            try:
                pipe.send(None)
            except OSError:
                continue
        for process in self._processes:
            process.join(30)
            if process.is_alive():
                process.kill()
                process.join()


def _rank_main(rank: int, tp: int, pp: int, port: int, base: Path, pipe: Connection) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["TORCH_GLOO_LAZY_INIT"] = "1"  # as the product's ranks have it, and engines do not
    from asyppo_megatron.backend import prepare_megatron
    from asyppo_megatron.config import LayoutConfig
    from asyppo_megatron.models.gpt import build_model, transformer_config
    from asyppo_megatron.models.spec import ModelSpec
    from asyppo_megatron.parallel.layout import ParallelLayout
    from asyppo_megatron.parallel.process_groups import GroupRegistry, build_groups

    store = dist.TCPStore("127.0.0.1", port, tp * pp, is_master=False, timeout=LIMIT)
    dist.init_process_group(
        "gloo", store=dist.PrefixStore("torch", store), rank=rank, world_size=tp * pp, timeout=LIMIT
    )
    prepare_megatron()
    spec = ModelSpec.from_hf(base)
    groups = build_groups(ParallelLayout(tuple(range(tp * pp)), tp=tp, pp=pp), GroupRegistry())
    config = transformer_config(spec, LayoutConfig(tp=tp, pp=pp), precision="fp32", recompute="none")
    model = build_model(spec, config, groups, value_head=False, trainable=False)
    state = Rank(model, spec, groups, config, dist.PrefixStore("asyppo", store))
    while (command := pipe.recv()) is not None:
        function, args = command
        try:
            pipe.send(function(state, *args))
        except Exception as e:
            e.add_note(traceback.format_exc())
            pipe.send(RuntimeError(f"{type(e).__name__}: {e}\n{traceback.format_exc()}"))
    for sync in state.syncs.values():
        sync.close()
    os._exit(0)


def load(rank: Rank, directory: Path) -> None:
    """Give the actor the weights of a Hugging Face directory."""
    from asyppo_megatron.convert.load import load_hf

    at = rank.groups.at
    load_hf(rank.model, rank.spec, directory, tp_rank=at.tp, tp_size=rank.groups.layout.tp)


def push(rank: Rank, name: str, targets: list[Any], version: int, options: dict[str, Any]) -> dict[str, Any]:
    """Push a version; syncs are kept by name."""
    from asyppo_megatron.weight_sync.orders import SyncOptions
    from asyppo_megatron.weight_sync.push import EngineSync

    rank.targets[name] = targets
    if name not in rank.syncs:
        rank.syncs[name] = EngineSync(
            rank.groups, rank.spec, rank.store, torch.device("cpu"), SyncOptions(**options),
            targets=lambda _: rank.targets[name], name=name,
        )  # fmt: skip
    return rank.syncs[name].push(rank.model, version)


def release(rank: Rank, name: str) -> None:
    rank.syncs[name].release()


def wake(rank: Rank, name: str) -> None:
    rank.syncs[name].wake()


def corrupt_next_bucket(rank: Rank, name: str) -> None:
    """From now on the first stage flips one bit of every bucket where it leaves the sender."""
    sender = rank.syncs[name].sender.collective
    if sender is None or sender.stage:
        return
    send = sender.send

    def flip(group: Any, flat: torch.Tensor) -> None:
        wrong = flat.clone()
        wrong[len(wrong) // 2] ^= 1
        send(group, wrong)

    sender.send = flip


def logprobs(rank: Rank, tokens: list[int]) -> torch.Tensor | None:
    """f32 [T - 1]: log p(token t + 1 | tokens up to t) under the actor, on ranks of the last stage."""
    import torch.distributed as dist

    from asyppo_megatron.packing import plan_micro_batches
    from asyppo_megatron.roles.runner import PackRunner, make_pack

    ids = torch.tensor(tokens, dtype=torch.int32)
    layout = rank.groups.layout
    plans = plan_micro_batches(
        torch.tensor([0, len(tokens)], dtype=torch.int32), torch.arange(1), dp_size=1, max_tokens=256,
        multiple=layout.tp, fixed_size=layout.pp > 1,
    )  # fmt: skip
    runner = PackRunner(rank.model, rank.config, rank.groups, 256)
    outs = runner.forward([make_pack(p, ids) for p in plans[0]], lambda out, pack: out)
    if not rank.groups.is_last_stage:
        return None
    flat = outs[0].reshape(-1, outs[0].shape[-1]).contiguous()
    parts = [torch.empty_like(flat) for _ in range(layout.tp)]
    dist.all_gather(parts, flat, group=rank.groups.collection.tp)
    logits = torch.cat(parts, -1)[: len(tokens) - 1, : rank.spec.vocab_size]
    return logits.float().log_softmax(-1).gather(1, ids[1:, None].long())[:, 0]


def fill_disk(rank: Rank, is_full: bool) -> None:
    """Whether the last stage's disk takes no more bytes."""
    import errno

    from asyppo_megatron.convert.safetensors_file import SafetensorsFile

    if rank.groups.at.pp != rank.groups.layout.pp - 1:
        return
    if is_full:
        rank.syncs["write"] = SafetensorsFile.write

        def write(*_: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        SafetensorsFile.write = write
    else:
        SafetensorsFile.write = rank.syncs.pop("write")


def kill_before_bucket(rank: Rank, name: str, pids: list[int]) -> None:
    """The first stage kills these processes just before it sends its second bucket."""
    import signal

    sender = rank.syncs[name].sender.collective
    if sender is None or sender.stage:
        return
    send, count = sender.send, 0

    def kill(group: Any, flat: torch.Tensor) -> None:
        nonlocal count
        count += 1
        if count == 2:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        send(group, flat)

    sender.send = kill
