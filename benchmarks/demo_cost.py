"""What a step of the demo costs: CPU seconds over all processes, peak memory of each, time outside model compute.

    python benchmarks/demo_cost.py [--steps 40] [--out benchmarks/results/demo_cost.json] [key=value ...]

Runs the real demo (its base models are made first where they are missing) and watches its processes from outside.
CPU seconds are those between the end of the first step and the end of the last, evaluations left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from machine import describe_machine

_SAMPLE_S = 0.05


def watch(command: list[str], metrics: Path, steps: int) -> dict[str, Any]:
    """Run the demo; CPU seconds by process at the first and last step, and every process's peak memory."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    root = psutil.Process(process.pid)
    cpu: dict[int, float] = {}
    peak: dict[int, float] = {}
    names: dict[int, str] = {}
    marks: dict[int, float] = {}
    while process.poll() is None:
        for p in [root, *root.children(recursive=True)]:
            try:
                times, status = p.cpu_times(), Path(f"/proc/{p.pid}/status").read_text()
                cpu[p.pid] = times.user + times.system
                peak[p.pid] = int(status.partition("VmHWM:")[2].split()[0]) / 2**20
                names[p.pid] = "launcher" if p.pid == root.pid else f"child of {p.ppid()}"
            except (psutil.Error, OSError, IndexError):
                continue  # it has just ended
        done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        for step in range(1, done + 1):
            marks.setdefault(step, sum(cpu.values()))
        time.sleep(_SAMPLE_S)
    if process.returncode:
        raise SystemExit(f"the demo ended with exit code {process.returncode}")
    return {
        "cpu_seconds_per_step": (marks[steps] - marks[1]) / (steps - 1),
        "cpu_seconds_total": sum(cpu.values()),
        "peak_gib_by_process": {f"{names[pid]} ({pid})": round(gib, 3) for pid, gib in peak.items()},
        "peak_gib": max(peak.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    base = [sys.executable, "-m", "asyppo_megatron", "demo"]
    with tempfile.TemporaryDirectory() as scratch:
        run_dir = Path(scratch) / "run"
        subprocess.run([*base, f"run_dir={scratch}/warm", "num_steps=1", "eval.every=0"], check=True)
        command = [*base, f"run_dir={run_dir}", f"num_steps={arguments.steps}", "eval.every=0", *arguments.overrides]
        result = watch(command, run_dir / "metrics.jsonl", arguments.steps)
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    result["seconds_per_step"] = statistics.mean(r["seconds/step"] for r in rows)
    result["fraction_outside_compute"] = sum(r["seconds/other"] for r in rows) / sum(r["seconds/step"] for r in rows)
    result["machine"] = describe_machine()
    for name in ("cpu_seconds_per_step", "seconds_per_step", "fraction_outside_compute", "peak_gib"):
        print(f"{name:<28}{result[name]:.3f}")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
