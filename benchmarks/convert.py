"""Claim: a conversion costs at most 3 times a file copy of the same bytes, and 3 times the largest tensor + 1 GiB.

A Qwen3 of random weights (by default shaped like the 0.6B: vocabulary 151,936, tied, bf16) goes to a Megatron
distributed checkpoint and back, beside a plain copy of the same bytes and a bare load + save of the safetensors
library, in turns; seconds are medians over the turns, imports and process start left out, everything flushed to the
disk (the copy with and without). Memory is the peak over samples (200 a second, in a turn of its own) of the anonymous
memory of all processes together, shared pages counted once (Pss_Anon), imports included.

    python benchmarks/convert.py --out benchmarks/results/convert.json
    python benchmarks/convert.py --shape 4b --turns 1
"""

from __future__ import annotations

import argparse
import json
import mmap
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from machine import describe_machine
from safetensors.torch import load_file, save_file

from asyppo_megatron.convert.hf_io import SINGLE, HFCheckpoint
from asyppo_megatron.convert.megatron_io import MegatronCheckpoint
from asyppo_megatron.convert.pool import default_processes
from asyppo_megatron.convert.safetensors_file import SafetensorsFile, TensorInfo
from asyppo_megatron.convert.table import hf_tensors
from asyppo_megatron.convert.to_hf import megatron_to_hf
from asyppo_megatron.convert.to_megatron import HFSource, Layout, hf_to_megatron
from asyppo_megatron.models.spec import ModelSpec

# hidden, ffn, layers, heads
SHAPES = {
    "tiny": (256, 512, 4, 4),
    "0.6b": (1024, 3072, 28, 16),
    "1.7b": (2048, 6144, 28, 16),
    "4b": (2560, 9728, 36, 32),
}
MAX_RATIO, MAX_TENSORS, MAX_MORE = 3.0, 3, 1 << 30
GIB = 1 << 30
NAMES = ("hf", "megatron", "back", "copy.safetensors")


def make_checkpoint(path: Path, shape: str) -> ModelSpec:
    """A tied Qwen3 in bf16 whose tensors are random bits of a small range."""
    hidden, ffn, layers, heads = SHAPES[shape]
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": hidden, "intermediate_size": ffn,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 8 if heads > 8 else heads,
        "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True, "rope_theta": 1e6, "dtype": "bfloat16",
    }  # fmt: skip
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    spec = ModelSpec.from_hf(path)
    infos = {n: TensorInfo(s, torch.bfloat16) for n, s in hf_tensors(spec).items()}
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).bfloat16()
    file = SafetensorsFile(path / SINGLE, infos)
    for name, info in infos.items():
        size = torch.Size(info.shape).numel()
        file.write(name, block.repeat(-(-size // block.numel()))[:size].view(info.shape))
    file.close()
    return spec


def anonymous_bytes(root: int) -> int:
    """Anonymous memory of a process and all its descendants, shared pages counted once."""
    total, waiting = 0, [root]
    while waiting:
        pid = waiting.pop()
        try:
            waiting += [
                int(c) for t in Path(f"/proc/{pid}/task").iterdir() for c in (t / "children").read_text().split()
            ]
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss_Anon:"):
                    total += int(line.split()[1]) << 10
        except (OSError, ValueError):
            continue  # it has just ended
    return total


def _sample(root: int, peak: Any, stop: Any) -> None:
    own = os.getpid()
    while not stop.is_set():
        peak.value = max(peak.value, anonymous_bytes(root) - anonymous_bytes(own))
        time.sleep(0.005)


def cpu_seconds() -> float:
    """Of this process and those it has waited for, kernel time included."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def seconds_of(work: Callable[[], None]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    started, cpu = time.perf_counter(), cpu_seconds()
    work()
    return time.perf_counter() - started, cpu_seconds() - cpu


def peak_of(work: Callable[[], None]) -> int:
    """Peak anonymous bytes of this process and those it starts. Apart from timing: looking costs the ones looked at."""
    context = multiprocessing.get_context("fork")
    peak, stop = context.Value("q", 0), context.Event()
    sampler = context.Process(target=_sample, args=(os.getpid(), peak, stop), daemon=True)
    sampler.start()
    work()
    stop.set()
    sampler.join()
    return peak.value


def warm_memory(size: int) -> None:
    """Touch and free memory, so that a virtual machine has given it before the clock runs, to all contenders alike."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with mmap.mmap(-1, min(size, available // 2), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE):
        pass


def flush(path: Path) -> None:
    for file in [path] if path.is_file() else path.iterdir():
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def check_equal(a: Path, b: Path) -> None:
    """Refuse a way there and back that changed anything."""
    first, second = HFCheckpoint(a), HFCheckpoint(b)
    if set(first.names) != set(second.names) or not all(
        torch.equal(first.read(n), second.read(n)) for n in first.names
    ):
        raise RuntimeError(f"{b}: the weights differ from those of {a}")


def contenders_in(folder: Path, spec: ModelSpec, processes: int, tp: int) -> dict[str, Callable[[], None]]:
    """What is measured, by name."""
    hf, megatron, back, copy = (folder / n for n in NAMES)

    def to_megatron() -> None:
        source = HFSource(hf, "actor", None, None)
        hf_to_megatron(
            source, hf, megatron, role="actor", layout=Layout(tp), force=True, processes=processes, quiet=True
        )

    def to_hf() -> None:
        source = MegatronCheckpoint(megatron, spec)
        megatron_to_hf(source, megatron, back, role="actor", force=True, processes=processes, quiet=True)

    def plain_copy() -> None:
        shutil.copyfile(hf / SINGLE, copy)

    def copy_and_flush() -> None:
        plain_copy()
        flush(copy)

    def load_and_save() -> None:
        save_file(load_file(hf / SINGLE), copy)

    return {
        "copy": plain_copy,
        "copy, flushed": copy_and_flush,
        "load + save": load_and_save,
        "to Megatron": to_megatron,
        "to Hugging Face": to_hf,
    }


def turns(folder: Path, spec: ModelSpec, count: int, processes: int, tp: int) -> dict[str, dict[str, float]]:
    """Every contender once a turn, so that what else the machine does meets all alike."""
    hf, megatron, back, copy = (folder / n for n in NAMES)
    contenders = contenders_in(folder, spec, processes, tp)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    peaks: dict[str, int] = {}
    for turn in range(count + 1):
        for name, work in contenders.items():
            for target in (copy, back, *((megatron,) if name != "to Hugging Face" else ())):
                shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
            os.sync()  # what the last contender left to write is not this one's
            warm_memory(2 * (hf / SINGLE).stat().st_size)
            if turn < count:
                seconds[name].append(seconds_of(work))
            else:
                peaks[name] = peak_of(work)
    check_equal(hf, back)
    return {
        n: {
            "seconds": median(wall for wall, _ in seconds[n]),
            "fastest_seconds": min(wall for wall, _ in seconds[n]),
            "cpu_seconds": median(cpu for _, cpu in seconds[n]),
            "peak_bytes": peaks[n],
        }
        for n in contenders
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    parser.add_argument("--shape", choices=SHAPES, default="0.6b")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--processes", type=int, default=default_processes())
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--dir", type=Path, help="where to work; default: the temporary directory")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        spec = make_checkpoint(Path(name) / "hf", args.shape)
        size = (Path(name) / "hf" / SINGLE).stat().st_size
        rows = turns(Path(name), spec, args.turns, args.processes, args.tp)
    largest = max(2 * torch.Size(s).numel() for s in hf_tensors(spec).values())
    limit = MAX_TENSORS * largest + MAX_MORE
    base = rows["copy"]["seconds"]
    print(
        f"Qwen3 {args.shape}, {size / 1e9:.2f} GB, largest tensor {largest / GIB:.2f} GiB, {args.processes} processes"
    )
    for n, row in rows.items():
        ratio, fastest, cpu = row["seconds"] / base, row["fastest_seconds"], row["cpu_seconds"]
        print(
            f"{n:18}{row['seconds']:7.2f} s {ratio:5.2f} x copy {size / row['seconds'] / 1e6:6.0f} MB/s, fastest "
            f"{fastest:.2f} s, {cpu:.2f} CPU s, {row['peak_bytes'] / GIB:.2f} GiB"
        )
    ways = ("to Megatron", "to Hugging Face")
    met = all(rows[w]["seconds"] <= MAX_RATIO * base and rows[w]["peak_bytes"] <= limit for w in ways)
    print(f"bar: {MAX_RATIO:.0f} x copy and {limit / GIB:.2f} GiB each way: {'met' if met else 'MISSED'}")
    if args.out:
        bar = {"max_ratio_to_copy": MAX_RATIO, "max_peak_bytes": limit, "met": met}
        result = {"machine": describe_machine(), "shape": args.shape, "bytes": size, "largest_tensor_bytes": largest}
        result |= {"processes": args.processes, "tp": args.tp, "turns": args.turns, "bar": bar, "results": rows}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
