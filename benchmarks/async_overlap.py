"""How well generation and training overlap: step time at staleness 1 against the longer of the two, at 0 against both.

    python benchmarks/async_overlap.py [--steps 16] [--out benchmarks/results/async_overlap.json] [key=value ...]

Runs the demo (its base models are made first where they are missing) with one rank that holds the actor and both
critics, and the embedded engine in the driver: two processes that compute, so they want two idle cores. Per step, means
over the steps after the first three but the last, beside which nothing is generated any more:

    generation   seconds that the synchronous run's batches took to generate and verify
    training     seconds of its steps without the wait for rollouts
    step 0, 1    seconds of a step at staleness 0 and 1

The bar, step 1 <= 1.15 x max(generation, training), holds where the two lie within a factor of 1.5; overrides can bring
them there (rollout.max_batch for generation alone, actor.epochs for training alone).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import describe_machine

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 3
BAR, SIMILAR = 1.15, 1.5
LAYOUT = [
    "actor.ranks=0",
    "actor.layout.tp=1",
    "critics.*.ranks=0",
    "rollout.max_batch=16",  # a batch in eight parts, one after the other: generation takes about as long as training
    "eval.every=0",
    "checkpoint.every=0",
    "checkpoint.at_end=false",
    "checkpoint.export_hf=false",
]


def run(run_dir: Path, steps: int, overrides: list[str]) -> list[dict[str, Any]]:
    """Rows of the steps between the warm-up and the last."""
    command = [sys.executable, "-m", "asyppo_megatron", "demo", f"run_dir={run_dir}", f"num_steps={steps}"]
    subprocess.run([*command, *LAYOUT, *overrides], check=True, cwd=ROOT, stdout=subprocess.DEVNULL, timeout=3600)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if WARM_UP < row["step"] < steps]


def mean(rows: list[dict[str, Any]], value: Any) -> float:
    return statistics.mean(value(row) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        runs = {
            stale: run(
                Path(scratch) / f"run{stale}", arguments.steps, [f"rollout.max_staleness={stale}", *arguments.overrides]
            )
            for stale in (0, 1)
        }
    generation = mean(runs[0], lambda r: r["generate_seconds"])
    training = mean(runs[0], lambda r: r["seconds/step"] - r["seconds/rollouts"])
    step = {stale: mean(rows, lambda r: r["seconds/step"]) for stale, rows in runs.items()}
    result = {
        "generation_s": generation,
        "training_s": training,
        "step_s_at_staleness_0": step[0],
        "step_s_at_staleness_1": step[1],
        "step_1_to_longer": step[1] / max(generation, training),
        "step_0_to_sum": step[0] / (generation + training),
        "longer_to_shorter": max(generation, training) / min(generation, training),
        "staleness_mean": mean(runs[1], lambda r: r["staleness/mean"]),
        "load_before": load,
        "steps": len(runs[1]),
        "overrides": arguments.overrides,
        "machine": describe_machine(),
    }
    for name, value in result.items():
        if isinstance(value, float):
            print(f"{name:<28}{value:.3f}")
    verdict = "met" if result["step_1_to_longer"] <= BAR else "missed"
    if result["longer_to_shorter"] > SIMILAR:
        verdict = "does not apply: bring generation and training nearer to each other by overrides"
    print(f"bar: step_1_to_longer <= {BAR} where longer_to_shorter <= {SIMILAR}: {verdict}")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
