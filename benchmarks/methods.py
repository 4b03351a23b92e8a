"""Every method of the family on the demo's task: accuracy, CPU time and peak memory, only the key `method` changed.

    python benchmarks/methods.py [--methods asyppo,grpo] [--seeds 0,1,2] [--docs] [key=value ...]

Runs one after another; what is in the result file already (of the same settings) is not run again, so an interrupted
table goes on where it stopped; remove the file to measure all again. `asyppo demo` must have made the base models
(runs/demo-data).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from machine import describe_machine

from asyppo_megatron.config import Config, load_config
from asyppo_megatron.config.methods import METHODS
from asyppo_megatron.observability.metrics import read_metrics

CONFIG = Path("model_configs/runs/demo_methods.yaml")
OUT = Path("benchmarks/results/methods.json")
DOCS = Path("docs/methods.md")
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
NOT_BARRED = ("vapo", "asympo", "spo")  # reported without a bar
BAR = 0.80
SAMPLE_S = 0.5
OWN = ("seconds/generation", "seconds/actor_logprobs", "seconds/actor_update")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(m for m in METHODS if m != "custom"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--runs", type=Path, default=Path("runs/methods"))
    parser.add_argument("--timeout", type=float, default=1800.0, help="longest that one run may take, s")
    parser.add_argument("--docs", action="store_true", help=f"put the table into {DOCS}")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that a run under way is ended too
    results = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {"runs": {}}
    failed = []
    for seed in arguments.seeds.split(","):
        for method in arguments.methods.split(","):
            overrides = [f"method={method}", f"seed={seed}", *arguments.overrides]
            run_dir = arguments.runs / f"{method}-{seed}"
            config = load_config(CONFIG, [*overrides, f"run_dir={run_dir}"])
            key, settings = f"{method}-{seed}", fingerprint(config)
            if results["runs"].get(key, {}).get("settings") == settings:
                continue
            try:
                found = measure(config, overrides, run_dir, arguments.timeout)
            except RuntimeError as e:
                failed.append(f"{key}: {e}")
                print(failed[-1], file=sys.stderr, flush=True)
                continue
            results["runs"][key] = {"method": method, "seed": int(seed), "settings": settings, **found}
            results["machine"] = describe_machine()
            write(arguments.out, json.dumps(results, indent=1) + "\n")
            print(f"{key:<20}greedy {found['greedy']:.3f}  CPU {found['cpu_seconds']:.1f} s", flush=True)
    text = table(results)
    print(text)
    if arguments.docs:
        put_into_docs(text)
    return 1 if failed or below_the_bar(results) else 0


def fingerprint(config: Config) -> str:
    """Of all that a run is set to, but for its place and what has its default."""
    text = json.dumps(config.model_dump(mode="json", exclude={"run_dir"}, exclude_defaults=True), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def measure(config: Config, overrides: list[str], run_dir: Path, timeout_s: float) -> dict[str, Any]:
    """One run from its beginning.

    Raises:
        RuntimeError: it failed or took too long.
    """
    subprocess.run(["rm", "-rf", str(run_dir)], check=True)
    run_dir.mkdir(parents=True)
    command = [sys.executable, "-m", "asyppo_megatron", "train", str(CONFIG), *overrides, f"run_dir={run_dir}"]
    before = cpu_of_children()
    with (run_dir / "output.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            peak = watch(process, timeout_s)
        finally:
            if process.poll() is None:
                end(process)
    if process.returncode:
        raise RuntimeError(f"ended with exit code {process.returncode}, see {run_dir / 'output.log'}")
    rows = read_metrics(run_dir / "metrics.jsonl")
    evaluations = [row["eval/heldout/greedy"] for row in rows if "eval/heldout/greedy" in row]
    steps = [row for row in rows if "seconds/step" in row]
    seconds = sum(row["seconds/step"] for row in steps)
    return {
        "greedy_before": evaluations[0],
        "greedy": evaluations[-1],
        "steps": len(steps),
        "ranks": config.num_ranks,
        "critics": config.num_critics,
        "cpu_seconds": cpu_of_children() - before,
        "cpu_seconds_ranks": sum(row["cpu_seconds/ranks"] for row in steps),
        "seconds_steps": seconds,
        "step_over_own": seconds / sum(row.get(name, 0.0) for row in steps for name in OWN),
        "peak_mib": peak,
        "dropped_groups": sum(row.get("filter/dropped_groups", 0) for row in steps),
        "load": os.getloadavg()[0],
    }


def watch(process: subprocess.Popen[bytes], timeout_s: float) -> float:
    """Wait for the end; largest sum of the processes' proportional memory (shared pages counted once), MiB."""
    root, peak, deadline = psutil.Process(process.pid), 0.0, time.monotonic() + timeout_s
    while process.poll() is None:
        if time.monotonic() > deadline:
            raise RuntimeError(f"took more than {timeout_s:.0f} s")
        total = 0
        try:
            processes = [root, *root.children(recursive=True)]
        except psutil.Error:
            break  # it has just ended
        for p in processes:
            try:
                total += p.memory_full_info().pss
            except psutil.Error:
                continue
        peak = max(peak, total / 2**20)
        time.sleep(SAMPLE_S)
    process.wait(60)
    return peak


def end(process: subprocess.Popen[bytes]) -> None:
    """Stop a run and all of its processes."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def cpu_of_children() -> float:
    """CPU seconds of all processes that this one has waited for, their own children included."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def table(results: dict[str, Any]) -> str:
    """Markdown, one row a method: values over seeds as they came out."""
    lines = [
        "| method | ranks | critics | greedy before | greedy after, each seed | mean | CPU s a run | CPU s, ranks' "
        "steps | peak MiB | step / own time |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        runs = sorted((r for r in results["runs"].values() if r["method"] == method), key=lambda r: r["seed"])
        if not runs:
            continue

        def mean(name: str, runs: list[dict[str, Any]] = runs) -> float:
            return statistics.mean(r[name] for r in runs)

        each = ", ".join(f"{r['greedy']:.3f}" for r in runs)
        lines.append(
            f"| {method} | {runs[0]['ranks']} | {runs[0]['critics']} | {mean('greedy_before'):.3f} | {each} "
            f"| {mean('greedy'):.3f} | {mean('cpu_seconds'):.1f} | {mean('cpu_seconds_ranks'):.1f} "
            f"| {mean('peak_mib'):.0f} | {mean('step_over_own'):.2f} |"
        )
    return "\n".join([*lines, "", footnote(results)])


def footnote(results: dict[str, Any]) -> str:
    """On what, and under which load, these numbers were taken: load makes CPU seconds and wall-clock ratios grow."""
    loads, machine = [run["load"] for run in results["runs"].values()], results["machine"]
    torch = machine["versions"].get("torch", "?")
    return (
        f"{len(loads)} runs on {machine['cores']} cores ({machine['cpu']}), Python {machine['python']}, torch {torch}; "
        f"load average after a run {min(loads):.1f} to {max(loads):.1f}."
    )


def below_the_bar(results: dict[str, Any]) -> list[str]:
    """Runs of barred methods that did not learn; printed."""
    low = [k for k, r in results["runs"].items() if r["method"] not in NOT_BARRED and r["greedy"] < BAR]
    if low:
        print(f"below greedy {BAR}: {', '.join(low)}")
    return low


def put_into_docs(text: str) -> None:
    before, rest = DOCS.read_text().split(BEGIN)
    write(DOCS, f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


def write(path: Path, text: str) -> None:
    """Complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    part.replace(path)


if __name__ == "__main__":
    sys.exit(main())
