"""Claim: what every rank does for a step of 2,048 x 8k tokens besides the models costs at most 10 s and 4 GB.

Four gloo processes plan the micro-batches, receive the batch from rank 0 (9 bytes a token), and each
computes GAE, masks and targets with two critics for the whole batch, then the checksum. Seconds are the
slowest rank's, the median over the repeats. Wall seconds mean little where four processes share fewer
cores, so CPU seconds (all threads of a process, kernel time included) are what is held against the bar: they
are the time that a process with a core of its own would need.

    python benchmarks/step_scale.py --out benchmarks/results/step_scale.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from machine import describe_machine, peak_memory_gib

from asyppo_megatron.packing import plan_micro_batches
from asyppo_megatron.ppo.advantages import gae, terminal_rewards
from asyppo_megatron.ppo.ensemble import aggregate_values, uncertainty_masks, value_std
from asyppo_megatron.ppo.targets import checksum, compute_targets
from asyppo_megatron.types import PackedBatch, Scores

WORLD = 4
RESPONSES, GROUP, CRITICS = 2048, 32, 2
SHORTEST, LONGEST, PROMPT = 7192, 9192, 192
MAX_SECONDS, MAX_GIB = 10.0, 4.0
# GAE and the masks are timed alone too, but count once, inside the targets.
COUNTED = ("packing", "broadcast", "targets", "checksum")
PHASES = ("packing", "broadcast", "gae (in targets)", "masks (in targets)", "targets", "checksum")


def synthetic_batch(responses: int) -> PackedBatch:
    """A batch of `responses` responses of about 8k tokens; the prompt's tokens are outside the loss."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(SHORTEST, LONGEST + 1, (responses,), generator=generator)
    cu = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])
    total = int(cu[-1])
    mask = torch.ones(total, dtype=torch.bool)
    mask[cu[1:] - 1] = False
    mask[(cu[:-1, None] + torch.arange(PROMPT - 1)).flatten()] = False
    return PackedBatch(
        step=0,
        policy_version=0,
        tokens=torch.randint(0, 150_000, (total,), generator=generator, dtype=torch.int32),
        cu_seqlens=cu.to(torch.int32),
        loss_mask=mask,
        rollout_logprobs=torch.rand(total, generator=generator).log_().mul_(mask),
        rewards=torch.randint(0, 2, (responses,), generator=generator).float(),
        group_ids=torch.arange(responses) // GROUP,
        truncated=torch.zeros(responses, dtype=torch.bool),
    )


def synthetic_scores(num_tokens: int) -> Scores:
    """What one exchange would have brought: the same on every rank."""
    generator = torch.Generator().manual_seed(1)
    old = torch.rand(num_tokens, generator=generator).log_()
    return Scores(old, torch.rand(CRITICS, num_tokens, generator=generator))


def received(batch: PackedBatch | None, responses: int) -> PackedBatch:
    """The batch on every rank: sizes first, then 9 bytes a token (called by all ranks of the world)."""
    cu = batch.cu_seqlens if batch else torch.empty(responses + 1, dtype=torch.int32)
    rewards = batch.rewards if batch else torch.empty(responses)
    dist.broadcast(cu, 0)
    dist.broadcast(rewards, 0)
    total = int(cu[-1])
    tokens = batch.tokens if batch else torch.empty(total, dtype=torch.int32)
    mask = batch.loss_mask if batch else torch.empty(total, dtype=torch.bool)
    logprobs = batch.rollout_logprobs if batch else torch.empty(total)
    for tensor in (tokens, mask, logprobs):
        dist.broadcast(tensor, 0)
    groups, truncated = torch.arange(responses) // GROUP, torch.zeros(responses, dtype=torch.bool)
    return PackedBatch(0, 0, tokens, cu, mask, logprobs, rewards, groups, truncated)


class Stopwatch:
    """Wall and CPU seconds of each phase; ranks enter a phase together."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        dist.barrier()
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall[name] = time.perf_counter() - wall
        self.cpu[name] = time.process_time() - cpu


def one_step(batch: PackedBatch | None, responses: int) -> tuple[Stopwatch, int]:
    """One step's work of one rank, and the checksum of its targets."""
    watch = Stopwatch()
    with watch.phase("broadcast"):
        batch = received(batch, responses)
    with watch.phase("packing"):
        plan = plan_micro_batches(batch.cu_seqlens, torch.arange(responses), dp_size=WORLD, max_tokens=16384)
    del plan
    scores = synthetic_scores(batch.num_tokens)
    with watch.phase("gae (in targets)"):
        rewards = terminal_rewards(batch.rewards, batch.loss_mask, batch.cu_seqlens)
        value = aggregate_values(scores.values)
        gae(rewards, value, batch.loss_mask, batch.cu_seqlens, gamma=1.0, lam=1.0)
    del rewards, value
    with watch.phase("masks (in targets)"):
        uncertainty_masks(value_std(scores.values), batch.loss_mask, k=0.2, h=0.2)
    with watch.phase("targets"):
        targets = compute_targets(batch, scores, k=0.2, h=0.2)
    with watch.phase("checksum"):
        total = checksum(targets)
    return watch, int(total)


def run_rank(rank: int, store: str, responses: int, repeats: int, results: multiprocessing.Queue) -> None:
    """Body of one process: `repeats` steps, checksums compared over the world after each."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    batch = synthetic_batch(responses) if rank == 0 else None
    watches = []
    for _ in range(repeats):
        watch, total = one_step(batch, responses)
        everyone = [torch.zeros(1, dtype=torch.long) for _ in range(WORLD)]
        dist.all_gather(everyone, torch.tensor([total]))
        if any(int(other) != total for other in everyone):
            raise RuntimeError(f"targets differ over ranks: checksums {[int(x) for x in everyone]}")
        watches.append((watch.wall, watch.cpu))
    results.put((watches, peak_memory_gib(), batch.num_tokens if batch else 0))
    dist.destroy_process_group()


def measure(responses: int, repeats: int) -> dict:
    """Fork the world for one batch size and gather what its ranks measured."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        args = (f"{folder}/store", responses, repeats, results)
        processes = [context.Process(target=run_rank, args=(rank, *args), daemon=True) for rank in range(WORLD)]
        for process in processes:
            process.start()
        ranks = []
        while len(ranks) < WORLD:
            if results.empty() and any(process.exitcode not in (None, 0) for process in processes):
                raise RuntimeError(f"a rank failed: exit codes {[process.exitcode for process in processes]}")
            time.sleep(0.05)
            while not results.empty():
                ranks.append(results.get())
        for process in processes:
            process.join()

    def slowest(kind: int, phase: str) -> float:
        return median(max(watches[r][kind][phase] for watches, *_ in ranks) for r in range(repeats))

    found = {"responses": responses, "tokens": max(tokens for *_, tokens in ranks)}
    return found | summary(slowest, max(peak for _, peak, _ in ranks))


def summary(slowest: Callable[[int, str], float], peak_gib: float) -> dict:
    """Seconds of each phase and of what counts, and the largest process."""
    wall = {phase: slowest(0, phase) for phase in PHASES}
    cpu = {phase: slowest(1, phase) for phase in PHASES}
    return {
        "wall_seconds": wall | {"total": sum(wall[phase] for phase in COUNTED)},
        "cpu_seconds": cpu | {"total": sum(cpu[phase] for phase in COUNTED)},
        "peak_memory_gib": peak_gib,
    }


def print_table(rows: list[dict]) -> None:
    print(f"{'':20}" + "".join(f"{row['tokens'] / 1e6:>18.2f}M" for row in rows) + "   tokens")
    print(f"{'':20}" + f"{'cpu s':>9} {'wall s':>9}" * len(rows))
    for phase in (*PHASES, "total"):
        cells = "".join(f"{row['cpu_seconds'][phase]:9.3f} {row['wall_seconds'][phase]:9.3f}" for row in rows)
        print(f"{phase:20}{cells}")
    per_token = [row["cpu_seconds"]["total"] / row["tokens"] * 1e9 for row in rows]
    print(f"{'ns a token':20}" + "".join(f"{nanoseconds:9.0f}{'':10}" for nanoseconds in per_token))
    print(f"{'peak memory, GiB':20}" + "".join(f"{row['peak_memory_gib']:9.2f}{'':10}" for row in rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    parser.add_argument("--repeats", type=int, default=3, help="steps of each size; medians are reported")
    parser.add_argument("--fractions", type=float, nargs="+", default=[1 / 16, 1 / 4, 1.0], help="of 2,048 responses")
    args = parser.parse_args()
    rows = [measure(round(RESPONSES * fraction), args.repeats) for fraction in args.fractions]
    print_table(rows)
    full = rows[-1]
    met = full["cpu_seconds"]["total"] <= MAX_SECONDS and full["peak_memory_gib"] <= MAX_GIB
    print(
        f"bar at {full['tokens'] / 1e6:.1f}M tokens: {full['cpu_seconds']['total']:.1f} of {MAX_SECONDS:.0f} CPU s, "
        f"{full['peak_memory_gib']:.1f} of {MAX_GIB:.0f} GiB a process: {'met' if met else 'MISSED'}"
    )
    if args.out:
        result = {"machine": describe_machine(), "processes": WORLD, "critics": CRITICS, "repeats": args.repeats}
        bar = {"max_cpu_seconds": MAX_SECONDS, "max_memory_gib": MAX_GIB, "met": met}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result | {"bar": bar, "sizes": rows}, indent=2) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
