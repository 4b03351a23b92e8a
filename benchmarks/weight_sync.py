"""What a weight sync costs beside a plain copy over the same transport: bytes, seconds per GiB, extra memory.

    python benchmarks/weight_sync.py [--shape 0.6b] [--tp 1] [--pp 1] [--bucket-mb 64] [--no-engine] [--out FILE]

On a CPU, of a random Qwen3 on tp x pp gloo ranks:
- wire: a push's stream of buckets to a receiver process that joins the update group as an engine does, without
  checksums; beside it, alternating, a plain gloo broadcast of the same bytes to the same receiver in pieces of
  `--bucket-mb` that lie ready (bar: at least 70 % of its speed);
- end to end: whole syncs into a real SGLang server of that shape, over `collective` and `ipc`, where there is SGLang.

On a GPU: the shapes of `--shape` on one GPU; a receiver process opens the CUDA IPC handles of every bucket and copies
the tensors into its own weights, as an engine would (bar for 14B: under 2 s).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
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


def receiver(store_port: int, stages: int, room: int, pipe: Connection) -> None:
    """Takes what an engine would take: joins every stage's group and receives piece after piece into one buffer."""
    from asyppo_megatron.weight_sync.groups import broadcast, join

    store = dist.TCPStore("127.0.0.1", store_port, is_master=False, timeout=LIMIT)
    groups = [join("gloo", dist.PrefixStore(f"s{s}", store), 2, f"s{s}", LIMIT, 1) for s in range(stages)]
    buffer = torch.ones(room, dtype=torch.uint8)  # written once: floor and wire meet the same memory
    while (order := pipe.recv()) is not None:
        for stage, size in order:
            broadcast(groups[stage], buffer[:size])
        pipe.send(int(buffer[:1024].sum()))
    os._exit(0)


class GlooRank:
    """One rank of the actor, and what it does on demand."""

    def __init__(self, rank: int, ports: tuple[int, int], directory: Path, args: Any):
        from asyppo_megatron.weight_sync.buckets import KeptBuffers
        from asyppo_megatron.weight_sync.groups import join

        self.args, self.count, self.syncs = args, 0, {}
        store = dist.TCPStore("127.0.0.1", ports[0], is_master=False, timeout=LIMIT)
        world = {"rank": rank, "world_size": args.tp * args.pp, "timeout": LIMIT}
        dist.init_process_group("gloo", store=dist.PrefixStore("w", store), **world)
        self.store = dist.PrefixStore("b", store)
        self.model, self.spec, self.groups = build(directory, args.tp, args.pp, torch.device("cpu"))
        self.stage, self.sends = self.groups.at.pp, self.groups.at.tp == 0
        engine = dist.TCPStore("127.0.0.1", ports[1], is_master=False, timeout=LIMIT)
        name = f"s{self.stage}"
        self.group = join("gloo", dist.PrefixStore(name, engine), 2, name, LIMIT) if self.sends else None
        self.buffers = KeptBuffers(lambda n: torch.empty(n, dtype=torch.uint8))
        self.piece = torch.ones(args.bucket_mb << 20 if self.sends else 0, dtype=torch.uint8)
        self.pool = ThreadPoolExecutor(1)
        self.before = _resident()

    def stream(self) -> Any:
        from asyppo_megatron.weight_sync.buckets import BucketStream

        self.buffers.release()
        return BucketStream(
            self.model, self.spec, tp_group=self.groups.collection.tp, dtype=None,
            bucket_bytes=self.args.bucket_mb << 20, allocate=self.buffers,
        )  # fmt: skip

    def plan(self) -> list[int]:
        return [p.num_bytes for p in self.stream().plans] if self.sends else []

    def floor(self, pieces: list[tuple[int, int]]) -> dict[str, float]:
        """The same bytes in equal pieces that lie ready, one stage after the other."""
        from asyppo_megatron.weight_sync.groups import broadcast

        self.count += 1
        dist.barrier()
        began, cpu = time.perf_counter(), time.process_time()
        for number, (stage, size) in enumerate(pieces):
            if number and pieces[number - 1][0] != stage:
                self.store.wait([f"floor/{self.count}/{pieces[number - 1][0]}"])
                began = time.perf_counter() if stage == self.stage else began
            if stage == self.stage and self.sends:
                broadcast(self.group, self.piece[:size])
                if number + 1 == len(pieces) or pieces[number + 1][0] != stage:
                    self.store.set(f"floor/{self.count}/{stage}", "1")
                    return {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}
        return {"seconds": 0.0, "cpu": 0.0}

    def wire(self) -> dict[str, float]:
        """A push's stream, from its planning to its last byte; without protocol and checksums."""
        from asyppo_megatron.weight_sync.collective import Turns

        self.count += 1
        dist.barrier()
        began, cpu = time.perf_counter(), time.process_time()
        sent: list[float] = []
        source = self.stream()
        counts = [0] * self.args.pp
        if self.sends:
            self.store.set(f"count/{self.count}/{self.stage}", str(len(source.plans)))
            counts = [int(self.store.get(f"count/{self.count}/{s}")) for s in range(self.args.pp)]
        turns = Turns(self.store, f"turn/{self.count}", counts, 0) if self.sends else None
        planned = time.perf_counter() - began
        for index, bucket in enumerate(source):
            if bucket is not None:
                bucket.busy.append(self.pool.submit(self._send, turns, index, bucket.flat, sent))
        seconds = time.perf_counter() - began
        moved = source.num_bytes if self.sends else 0
        extra = max(_resident() - self.before, 0)
        phases = {"planning": planned, "sending": sum(sent), "cpu": time.process_time() - cpu}
        return {"seconds": seconds, "extra": extra, "bytes": moved} | phases

    def _send(self, turns: Any, index: int, flat: torch.Tensor, sent: list[float]) -> None:
        from asyppo_megatron.weight_sync.groups import broadcast

        turns.wait(index, self.stage)
        began = time.perf_counter()
        broadcast(self.group, flat)
        sent.append(time.perf_counter() - began)
        turns.done(index, self.stage)

    def push(self, url: str, transport: str, version: int) -> dict[str, Any]:
        """A whole sync into a real engine."""
        from asyppo_megatron.weight_sync.engines import EngineTarget
        from asyppo_megatron.weight_sync.orders import SyncOptions
        from asyppo_megatron.weight_sync.push import EngineSync

        if transport not in self.syncs:
            options = SyncOptions(transport, self.args.bucket_mb << 20, "off", LIMIT.total_seconds())
            self.syncs[transport] = EngineSync(
                self.groups, self.spec, self.store, torch.device("cpu"), options,
                targets=lambda _: [EngineTarget(url)], name=f"benchmark-{transport}",
            )  # fmt: skip
        return self.syncs[transport].push(self.model, version)


def rank_main(rank: int, ports: tuple[int, int], directory: Path, args: Any, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ["TORCH_GLOO_LAZY_INIT"] = "1"  # as the product's ranks have it, and engines do not
    here = GlooRank(rank, ports, directory, args)
    while (order := pipe.recv()) is not None:
        what, *given = order
        pipe.send(getattr(here, what)(*given))
    for sync in here.syncs.values():
        sync.close()
    os._exit(0)


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

    def everywhere(*order: Any) -> list[Any]:
        for pipe in pipes:
            pipe.send(order)
        return [_answer(pipe) for pipe in pipes]

    row = _wire_and_floor(args, everywhere, ours)
    ours.send(None)
    if args.engine:
        row["engine"] = _engine(args, directory, everywhere, row["model_gib"])
    for pipe in pipes:
        pipe.send(None)
    for process in processes:
        process.join(20)
    return row


def _wire_and_floor(args: Any, everywhere: Any, receives: Connection) -> dict[str, Any]:
    """Both, alternating in one run with the same receiver: the first round of each warms up and does not count."""
    plans = [p for p in everywhere("plan") if p]
    in_turns = [(s, plans[s][k]) for k in range(max(map(len, plans))) for s in range(args.pp) if k < len(plans[s])]
    size = args.bucket_mb << 20
    pieces = [(s, min(size, sum(p) - at)) for s, p in enumerate(plans) for at in range(0, sum(p), size)]
    rows: dict[str, list[float]] = {"wire": [], "floor": []}
    phases: dict[str, list[float]] = {"planning": [], "sending": [], "cpu": []}
    floor_cpu: list[float] = []
    extra = 0
    for _ in range(args.repeats + 1):
        receives.send(pieces)
        results = everywhere("floor", pieces)
        _answer(receives)
        rows["floor"].append(sum(r["seconds"] for r in results))
        floor_cpu.append(sum(r["cpu"] for r in results))
        receives.send(in_turns)
        results = everywhere("wire")
        _answer(receives)
        rows["wire"].append(max(r["seconds"] for r in results))
        for name, values in phases.items():
            values.append(sum(r[name] for r in results))
        extra = max(extra, *(r["extra"] for r in results))
    gib = sum(map(sum, plans)) / GIB
    per_gib = {kind: statistics.median(values[1:]) / gib for kind, values in rows.items()}
    return {
        "transport": "gloo",
        "model_gib": gib,
        "bytes_moved_per_model_byte": sum(r["bytes"] for r in results) / GIB / gib,
        "seconds_per_gib": per_gib["wire"],
        "plain_broadcast_seconds_per_gib": per_gib["floor"],
        "fraction_of_floor": per_gib["floor"] / per_gib["wire"],
        "best_fraction": min(rows["floor"][1:]) / min(rows["wire"][1:]),
        "first_seconds": rows["wire"][0],
        # Of the senders; what sending costs beyond the floor's CPU is gathering.
        "phase_seconds": {name: statistics.median(values[1:]) for name, values in phases.items()},
        "floor_cpu_seconds": statistics.median(floor_cpu[1:]),
        "extra_memory_mib": extra / 2**20,
        "bucket_mib": args.bucket_mb,
        "buckets": sum(map(len, plans)),
        "tp": args.tp,
        "pp": args.pp,
        "runs": rows,
    }


def _engine(args: Any, directory: Path, everywhere: Any, gib: float) -> dict[str, Any]:
    """Whole syncs into a real SGLang server with random weights of the same shape, from pause to continue."""
    from asyppo_megatron.config import build_config
    from asyppo_megatron.launch.engine_command import engine_command
    from asyppo_megatron.launch.engine_process import EngineProcess, free_port, server_info

    sglang = {"max_total_tokens": 2048, "max_concurrency": 4, "mem_fraction": 0.5, "dtype": "bfloat16"}
    sglang["extra_args"] = ["--load-format", "dummy", "--skip-tokenizer-init"]
    rollout = {"engine": "sglang", "max_prompt_tokens": 256, "max_response_tokens": 256, "sglang": sglang}
    tree = {
        "run_dir": str(directory / "run"),
        "actor": {"model": str(directory), "precision": "fp32"},
        "ppo": {"advantage": "grpo", "advantage_mask_fraction": 0, "entropy_mask_fraction": 0},
        "data": {"train": "unused.jsonl"},
        "rollout": rollout,
    }
    stand_in = Path(__file__).resolve().parents[1] / "tests" / "engines" / "stand_in"  # of SGLang's CPU kernels
    path = os.pathsep.join(filter(None, [str(stand_in), os.environ.get("PYTHONPATH", "")]))
    port = free_port("127.0.0.1")
    command = engine_command(build_config(tree), 0, port, 0, {**os.environ, "PYTHONPATH": path})
    server = EngineProcess(command, f"http://127.0.0.1:{port}", directory / "engine.log")
    try:
        _wait_until_ready(server, server_info)
        seconds: dict[str, list[float]] = {"collective": [], "ipc": []}
        for number in range(args.repeats + 1):
            for offset, transport in enumerate(seconds):
                done = everywhere("push", server.url, transport, 2 * number + offset)[0]
                if done["engines"] != [server.url]:
                    raise RuntimeError(f"{transport}: the engine got nothing: {done}\n{server.log_tail()}")
                seconds[transport].append(done["seconds"])
    finally:
        server.close()
    return {
        name: {"seconds": statistics.median(values[1:]), "seconds_per_gib": statistics.median(values[1:]) / gib}
        | {"runs": values}
        for name, values in seconds.items()
    }


def _wait_until_ready(server: Any, server_info: Any) -> None:
    deadline = time.monotonic() + LIMIT.total_seconds()
    while True:
        try:
            server_info(server.url, 60)
            return
        except OSError as e:
            if server.exit_code() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the engine did not start: {e}\n{server.log_tail()}") from e
        time.sleep(0.5)


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
    parser.add_argument(
        "--engine", action=argparse.BooleanOptionalAction, default=importlib.util.find_spec("sglang") is not None,
        help="end to end with a real SGLang server (CPU only)",
    )  # fmt: skip
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
        for name, item in row.get("engine", {}).items():
            print(f"  into SGLang, {name}: {item['seconds']:.2f} s, {item['seconds_per_gib']:.3f} s/GiB", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"machine": describe_machine(with_gpu=has_gpu), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
