"""What a benchmark ran on: the part of a result without which its numbers mean nothing."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "numpy", "megatron-core", "transformer-engine", "triton", "transformers", "sglang")


def describe_machine(*, with_gpu: bool = False) -> dict:
    """Processor, memory, GPU and versions, as plain values for a result file.

    Args:
        with_gpu: ask CUDA for its devices too, which makes a later fork unusable for CUDA.
    """
    description = {
        "cpu": _first_value("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(int((_first_value("/proc/meminfo", "MemTotal") or "0 kB").split()[0]) / 2**20, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": _versions(),
    }
    return description | (_gpus() if with_gpu else {})


def peak_memory_gib() -> float:
    """Largest resident size of this process so far, GiB (VmHWM; Linux)."""
    return int((_first_value("/proc/self/status", "VmHWM") or "0 kB").split()[0]) / 2**20


def _first_value(path: str, key: str) -> str | None:
    """The value of the first `key: value` line of a file under /proc, None where there is none."""
    if not Path(path).exists():
        return None
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None


def _versions() -> dict[str, str]:
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return installed


def _gpus() -> dict:
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"gpus": names, "cuda": torch.version.cuda} if names else {"gpus": []}


if __name__ == "__main__":
    print(json.dumps(describe_machine(with_gpu=True), indent=2))
