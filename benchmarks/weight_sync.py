"""What a weight sync costs beside a plain copy over the same transport: bytes, seconds per GiB, extra memory.

On a CPU: a random Qwen3 of 0.6B shapes on tp x pp gloo ranks sends its buckets to a receiver process that joins the
update group as an engine does (bar: at least 70 % of a plain gloo broadcast in pieces of the same size, without
checksums). The way through shared memory and a whole sync into an SGLang server are not measured here yet.
On a GPU: the shapes of `--shape` on one GPU; a receiver process opens the CUDA IPC handles of every bucket and copies
the tensors into its own weights, as an engine would (bar for 14B: under 2 s).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from machine import describe_machine

GIB = 2**30
LIMIT = timedelta(seconds=900)
SHAPES = {  # hidden, ffn, layers, heads, kv heads, tied
    "tiny": (256, 512, 4, 8, 4, True),
    "0.6b": (1024, 3072, 28, 16, 8, True),
    "4b": (2560, 9728, 36, 32, 8, True),
    "14b": (5120, 17408, 40, 40, 8, False),
}
VOCABULARY = 151_936


def write_config(directory: Path, shape: str, dtype: str) -> None:
    hidden, ffn, layers, heads, kv, tied = SHAPES[shape]
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": 128,
        "vocab_size": 4096 if shape == "tiny" else VOCABULARY,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "eos_token_id": 1,
        "hidden_act": "silu",
        "attention_bias": False,
        "dtype": dtype,
    }
    (directory / "config.json").write_text(json.dumps(config))


def build(directory: Path, tp: int, pp: int, device: torch.device) -> tuple[Any, Any, Any]:
    """The random actor of this rank."""
    from asyppo_megatron.backend import prepare_megatron
    from asyppo_megatron.config import LayoutConfig
    from asyppo_megatron.models.gpt import build_model, transformer_config
    from asyppo_megatron.models.spec import ModelSpec
    from asyppo_megatron.parallel.layout import ParallelLayout
    from asyppo_megatron.parallel.process_groups import GroupRegistry, build_groups

    prepare_megatron()
    spec = ModelSpec.from_hf(directory)
    groups = build_groups(ParallelLayout(tuple(range(tp * pp)), tp=tp, pp=pp), GroupRegistry())
    precision = "bf16" if spec.dtype == "bfloat16" else "fp32"
    config = transformer_config(spec, LayoutConfig(tp=tp, pp=pp), precision=precision, recompute="none")
    model = build_model(spec, config, groups, value_head=False, trainable=False)
    generator = torch.Generator(device).manual_seed(groups.at.pp * 8 + groups.at.tp)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.02, generator=generator)
    return model, spec, groups


# --- CPU: gloo ranks and a receiver


def receiver(store_port: int, stages: int, base: Any, pipe: Connection) -> None:
    """Takes what an engine would take: joins every stage's group and receives bucket after bucket."""
    from asyppo_megatron.weight_sync.groups import broadcast, join

    store = dist.TCPStore("127.0.0.1", store_port, is_master=False, timeout=LIMIT)
    groups = [join("gloo", dist.PrefixStore(f"s{s}", store), 2, f"s{s}", LIMIT, 1) for s in range(stages)]
    buffer = torch.empty(base, dtype=torch.uint8)
    buffer.fill_(0)
    while (order := pipe.recv()) is not None:
        for stage, size in order:
            broadcast(groups[stage], buffer[:size])
        pipe.send(int(buffer[:1024].sum()))
    os._exit(0)


def rank_main(rank: int, ports: tuple[int, int], directory: Path, args: Any, pipe: Connection) -> None:
    torch.set_num_threads(1)
    from asyppo_megatron.weight_sync.buckets import BucketStream
    from asyppo_megatron.weight_sync.collective import Turns
    from asyppo_megatron.weight_sync.groups import broadcast, join

    world = args.tp * args.pp
    store = dist.TCPStore("127.0.0.1", ports[0], is_master=False, timeout=LIMIT)
    dist.init_process_group("gloo", store=dist.PrefixStore("w", store), rank=rank, world_size=world, timeout=LIMIT)
    model, spec, groups = build(directory, args.tp, args.pp, torch.device("cpu"))
    at = groups.at
    sends = at.tp == 0
    engine = dist.TCPStore("127.0.0.1", ports[1], is_master=False, timeout=LIMIT)
    name = f"s{at.pp}"
    group = join("gloo", dist.PrefixStore(name, engine), 2, name, LIMIT) if sends else None
    peak = _resident()

    def stream() -> Any:
        return BucketStream(
            model, spec, tp_group=groups.collection.tp, dtype=None, bucket_bytes=args.bucket_mb << 20,
            allocate=lambda n: torch.empty(n, dtype=torch.uint8),
        )  # fmt: skip

    from concurrent.futures import ThreadPoolExecutor

    pool = ThreadPoolExecutor(1)
    count = 0
    while (order := pipe.recv()) is not None:
        count += 1
        if order == "plan":
            pipe.send([p.num_bytes for p in stream().plans] if sends else [])
            continue
        dist.barrier()
        began = time.perf_counter()
        source = stream()
        if order == "sync":
            counts = [0] * args.pp
            if sends:
                store.set(f"count/{count}/{at.pp}", str(len(source.plans)))
                counts = [int(store.get(f"count/{count}/{s}")) for s in range(args.pp)]
            turns = Turns(store, f"turn/{count}", counts, 0) if sends else None
            for index, bucket in enumerate(source):
                if bucket is not None:
                    bucket.busy.append(pool.submit(_send, turns, index, at.pp, bucket.flat, group))
        elif sends:  # the floor: the same pieces, already flat, from one sender after the other
            flats = source.buffers
            for b in flats:
                b.fill_(1)
            for stage in range(args.pp):
                if stage == at.pp:
                    began = time.perf_counter()
                    for index, plan in enumerate(source.plans):
                        broadcast(group, flats[index % len(flats)][: plan.num_bytes])
                    store.set(f"floor/{count}/{stage}", "1")
                else:
                    store.wait([f"floor/{count}/{stage}"])
        seconds = time.perf_counter() - began
        moved = source.num_bytes if sends else 0
        pipe.send({"seconds": seconds, "extra": max(_resident() - peak, 0), "bytes": moved})
        source = bucket = flats = None  # their buffers go before the next round's come
    os._exit(0)


def _send(turns: Any, index: int, stage: int, flat: torch.Tensor, group: Any) -> None:
    from asyppo_megatron.weight_sync.groups import broadcast

    turns.wait(index, stage)
    broadcast(group, flat)
    turns.done(index, stage)


def _resident() -> int:
    """Largest resident size so far, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) << 10
    return 0


def cpu(args: Any, directory: Path) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=LIMIT) for _ in range(2)]
    ports = (stores[0].port, stores[1].port)
    pipes, processes = [], []
    for rank in range(args.tp * args.pp):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=rank_main, args=(rank, ports, directory, args, theirs), daemon=True))
        pipes.append(ours)
    ours, theirs = context.Pipe()
    largest = 2 * (args.bucket_mb << 20) + (2 << 30 if args.shape == "14b" else 1 << 30)
    processes.append(context.Process(target=receiver, args=(ports[1], args.pp, largest, theirs), daemon=True))
    for process in processes:
        process.start()

    def everywhere(order: Any) -> list[Any]:
        for pipe in pipes:
            pipe.send(order)
        return [_answer(pipe) for pipe in pipes]

    plans = [p for p in everywhere("plan") if p]
    in_turns = [(s, plans[s][k]) for k in range(max(map(len, plans))) for s in range(args.pp) if k < len(plans[s])]
    one_by_one = [(s, size) for s in range(args.pp) for size in plans[s]]
    rows: dict[str, list[float]] = {"sync": [], "floor": []}
    extra = total = 0
    for _ in range(args.repeats):
        for kind, order in (("floor", one_by_one), ("sync", in_turns)):  # alternating: both see the same machine
            ours.send(order)
            results = everywhere(kind)
            _answer(ours)
            total = sum(r["bytes"] for r in results)
            # The floor's stages follow each other and are timed one by one.
            both = [r["seconds"] for r in results if r["bytes"]]
            rows[kind].append(sum(both) if kind == "floor" else max(r["seconds"] for r in results))
            if kind == "sync":
                extra = max(extra, *(r["extra"] for r in results))
    for pipe in [*pipes, ours]:
        pipe.send(None)
    for process in processes:
        process.join(20)
    gib = total / GIB
    per_gib = {kind: statistics.median(values) / gib for kind, values in rows.items()}
    return {
        "transport": "gloo",
        "model_gib": gib,
        "bytes_moved_per_model_byte": 1.0,
        "seconds_per_gib": per_gib["sync"],
        "plain_broadcast_seconds_per_gib": per_gib["floor"],
        "fraction_of_floor": per_gib["floor"] / per_gib["sync"],
        "best_fraction": min(rows["floor"]) / min(rows["sync"]),
        "extra_memory_mib": extra / 2**20,
        "bucket_mib": args.bucket_mb,
        "tp": args.tp,
        "pp": args.pp,
        "runs": rows,
    }


def _answer(pipe: Connection) -> Any:
    if not pipe.poll(LIMIT.total_seconds()):
        raise TimeoutError("a process did not answer")
    return pipe.recv()


# --- GPU: one rank and a receiver that opens its handles


def open_handles(pipe: Connection) -> None:
    """Receives (handle, slots) of each bucket and copies the tensors into weights of its own, as an engine does."""
    weights: dict[str, torch.Tensor] = {}
    while (item := pipe.recv()) is not None:
        flat, slots = item
        for name, offset, size in slots:
            piece = flat[offset : offset + size]
            if name not in weights:
                weights[name] = torch.empty_like(piece)
            weights[name].copy_(piece)
        torch.cuda.synchronize()
        del flat, piece
        pipe.send(len(weights))
    os._exit(0)


def gpu(args: Any, directory: Path) -> dict[str, Any]:
    from concurrent.futures import ThreadPoolExecutor

    import torch.multiprocessing as mp

    from asyppo_megatron.weight_sync.buckets import BucketStream

    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dist.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    model, spec, groups = build(directory, 1, 1, device)
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=open_handles, args=(theirs,), daemon=True)
    process.start()
    pool = ThreadPoolExecutor(1)

    def post(bucket: Any) -> None:
        torch.cuda.set_device(device)
        ours.send((bucket.flat, [(s.name, s.offset, s.num_bytes) for s in bucket.plan.slots]))
        _answer(ours)

    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    runs, copies, total = [], [], 0
    for _ in range(args.repeats + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        stream = BucketStream(
            model, spec, tp_group=groups.collection.tp, dtype=None, bucket_bytes=args.bucket_mb << 20,
            allocate=lambda n: torch.empty(n, dtype=torch.uint8, device=device),
        )  # fmt: skip
        for bucket in stream:
            torch.cuda.current_stream().synchronize()
            bucket.busy.append(pool.submit(post, bucket))
        runs.append(time.perf_counter() - began)
        total = stream.num_bytes
        copies.append(_copy_seconds(total, device))
    peak = torch.cuda.max_memory_allocated() - before
    ours.send(None)
    process.join(20)
    gib = total / GIB
    seconds = statistics.median(runs[1:])
    return {
        "transport": "cuda ipc into a receiver process that opens the handles (no SGLang)",
        "model_gib": gib,
        "seconds": seconds,
        "first_seconds": runs[0],
        "seconds_per_gib": seconds / gib,
        "plain_copy_seconds_per_gib": statistics.median(copies[1:]) / gib,
        "fraction_of_floor": statistics.median(copies[1:]) / seconds,
        "extra_memory_mib": peak / 2**20,
        "bucket_mib": args.bucket_mb,
        "runs": runs,
    }


def _copy_seconds(num_bytes: int, device: torch.device) -> float:
    """A plain device copy of so many bytes, 1 GiB at a time."""
    a = torch.empty(GIB, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(-(-num_bytes // GIB)):
        b.copy_(a)
    torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, help="default: 0.6b on a CPU; 0.6b, 4b and 14b on a GPU")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--bucket-mb", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/weight_sync.json"))
    args = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    shapes = [args.shape] if args.shape else (["0.6b", "4b", "14b"] if has_gpu else ["0.6b"])
    rows = []
    for shape in shapes:
        args.shape = shape
        with tempfile.TemporaryDirectory() as directory:
            write_config(Path(directory), shape, "bfloat16")
            row = {"shape": shape, "load_average": os.getloadavg()} | (gpu if has_gpu else cpu)(args, Path(directory))
        rows.append(row)
        floor = row.get("plain_broadcast_seconds_per_gib", row.get("plain_copy_seconds_per_gib"))
        print(
            f"{shape}: {row['model_gib']:.2f} GiB, {row['seconds_per_gib']:.3f} s/GiB, plain {floor:.3f} s/GiB: "
            f"{100 * row['fraction_of_floor']:.0f} %, extra memory {row['extra_memory_mib']:.0f} MiB",
            flush=True,
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"machine": describe_machine(with_gpu=has_gpu), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
