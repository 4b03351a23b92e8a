"""What a jail costs: verdicts a second and CPU time a program, beside the same programs as plain processes.

python benchmarks/code_rewards.py [--programs 200] [--tests 3] [--workers 2] [--out benchmarks/results/code_rewards.json]
"""  # noqa: E501 - one command line

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from machine import describe_machine

from asyppo_megatron.config import RewardConfig
from asyppo_megatron.rewards import CodeReward, Sample

PROGRAM = "n = int(input())\nprint(sum(i * i for i in range(n)))\n"


def measured(work: Callable[[], None], programs: int) -> dict[str, float]:
    """Wall-clock and CPU milliseconds a program, of this process and of those it waited for."""

    def cpu() -> float:
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(u.ru_utime + u.ru_stime for u in usages)

    start, before = time.perf_counter(), cpu()
    work()
    seconds = time.perf_counter() - start
    return {"wall_ms": 1000 * seconds / programs, "cpu_ms": 1000 * (cpu() - before) / programs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=200)
    parser.add_argument("--tests", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/code_rewards.json"))
    args = parser.parse_args()
    tests = [{"stdin": str(n), "stdout": str(sum(i * i for i in range(n)))} for n in range(args.tests)]
    samples = [Sample(f"```python\n{PROGRAM}```", "", extra={"tests": tests})] * args.programs
    protection = ""

    def jailed() -> None:
        nonlocal protection
        reward = CodeReward(RewardConfig(kind="code", workers=args.workers, timeout_s=60.0))
        protection = reward.protection
        verdicts = reward.score_many(samples)
        reward.close()
        assert all(v.reward == 1.0 for v in verdicts), "a right program was judged wrong"

    def plain() -> None:
        for sample in samples:
            for test in sample.extra["tests"]:
                command = [sys.executable, "-I", "-S", "-c", PROGRAM]
                done = subprocess.run(command, input=test["stdin"], capture_output=True, text=True, timeout=60)
                assert done.stdout.strip() == test["stdout"]

    result = {
        "machine": describe_machine() | {"load": os.getloadavg()[0]},
        "programs": args.programs,
        "tests": args.tests,
        "workers": args.workers,
        "protection": protection,
        "jailed": measured(jailed, args.programs),
        "plain_one_after_another": measured(plain, args.programs),
    }
    result["protection"] = protection
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for name in ("jailed", "plain_one_after_another"):
        print(f"{name:24} {result[name]['wall_ms']:8.1f} ms wall, {result[name]['cpu_ms']:8.1f} ms CPU a program")


if __name__ == "__main__":
    main()
