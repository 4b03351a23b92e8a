"""Programs out of responses, run against tests in killable jails."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asyppo_megatron.config import RewardConfig
from asyppo_megatron.rewards.base import Sample, Verdict
from asyppo_megatron.rewards.pool import Failed, WorkerPool
from asyppo_megatron.rewards.sandbox import jail

log = logging.getLogger(__name__)

MAX_PROGRAM = 1 << 18  # characters
POOL_GRACE_S = 15.0  # a supervisor ends its jails itself; this is for one that hangs
START = "import sys; sys.path.append(sys.argv.pop(1)); from sandbox import supervisor; supervisor.main()"
FENCE = "```"
LANGUAGES = ("", "python", "python3", "py")


class CodeReward:
    """Runs the last program of a response against the row's tests.

    Raises:
        ValueError: this machine allows no isolation and the configuration does not allow to do without.
    """

    def __init__(self, config: RewardConfig):
        self._config = config
        sandbox = config.sandbox
        folder = str(Path(__file__).parent)
        python = str(sandbox.python or sys.executable)
        options = [python, "1" if sandbox.allow_unprotected else "0"]
        self._pool = WorkerPool(
            "code reward",
            lambda slot, fd: [
                *(sys.executable, "-I", "-S", "-c", START, folder),
                *(str(fd), str(os.getpid()), str(sandbox.uid + slot), *options),
            ],
            workers=config.workers,
            timeout_s=config.timeout_s + POOL_GRACE_S,
            max_reply=1 << 16,
            environment={},
            advice="look at reward.sandbox.python",
            directory="/",
        )
        try:
            greeting = self._pool.wait_until_ready()
            if "refused" in greeting:
                raise ValueError(
                    "reward.kind: got code, need a machine that can isolate programs (root, or unprivileged user "
                    f"namespaces); here: {'; '.join(greeting['refused']) or 'neither'}. Run where one is allowed, or "
                    "set reward.sandbox.allow_unprotected=true if everything this user can reach may be lost"
                )
        except (ValueError, RuntimeError):
            self._pool.close()
            raise
        self.protection = jail.describe(greeting["mode"])
        for reason in greeting["why"]:
            log.warning("code reward: no stronger protection: %s", reason)
        log.log(logging.WARNING if greeting["mode"] == "limits" else logging.INFO, "code reward: %s", self.protection)

    def score_many(self, samples: Sequence[Sample]) -> list[Verdict]:
        """Verdicts in the samples' order; never raises for a response."""
        programs = [extract_program(s.text) for s in samples]
        jobs = [
            self._job(program, sample) for program, sample in zip(programs, samples, strict=True) if program is not None
        ]
        replies = iter(self._pool.run(jobs))
        return [Verdict(0.0, "code_missing") if p is None else self._verdict(next(replies)) for p in programs]

    def close(self) -> None:
        self._pool.close()

    def _job(self, program: str, sample: Sample) -> dict[str, Any]:
        config, sandbox = self._config, self._config.sandbox
        return {
            "program": program,
            "tests": sample.extra["tests"],
            "stop_at_failure": sandbox.score == "all",
            "limits": {
                "memory": int(config.memory_gb * 2**30),
                "processes": sandbox.processes,
                "file_bytes": int(sandbox.file_mb * 2**20),
                "open_files": sandbox.open_files,
                "output_bytes": sandbox.output_kb * 1024,
                "test_s": sandbox.test_timeout_s,
                "total_s": config.timeout_s,
            },
        }

    def _verdict(self, reply: Any) -> Verdict:
        if isinstance(reply, Failed):
            return Verdict(0.0, reply.status)
        cause = reply["cause"]
        if cause.startswith("broken"):
            log.warning("code reward: %s", cause[:1000])
            return Verdict(0.0, "verifier_error")
        share = reply["passed"] / max(reply["total"], 1)
        reward = share if self._config.sandbox.score == "fraction" else float(share == 1.0)
        return Verdict(reward, "ok" if cause in ("", "wrong") else f"code_{cause}")


def extract_program(text: str) -> str | None:
    """The last complete fenced block of Python; None where there is none, or one of unreasonable size."""
    program: str | None = None
    language: str | None = None  # of the open block
    block: list[str] = []
    for line in text.replace("\r\n", "\n").split("\n"):  # splitlines would cut at characters that strings may hold
        if language is None:
            if line.startswith(FENCE):
                language, block = line[len(FENCE) :].strip().lower(), []
        elif line.rstrip() == FENCE:
            if language in LANGUAGES:
                program = "\n".join(block) + "\n"
            language = None
        else:
            block.append(line)
    return program if program is not None and len(program) <= MAX_PROGRAM and program.strip() else None


def row_error(extra: Mapping[str, Any]) -> str:
    """What is wrong with a dataset row's tests; empty when nothing is."""
    need = 'need a list of {"stdin": text, "stdout": text} or {"assert": code}'
    tests = extra.get("tests")
    if not isinstance(tests, list) or not tests:
        return f"tests: {'got ' + repr(tests)[:80] if 'tests' in extra else 'missing'}, {need}"
    for number, test in enumerate(tests):
        keys = set(test) if isinstance(test, dict) else None
        if keys not in ({"stdin", "stdout"}, {"assert"}) or not all(isinstance(v, str) for v in test.values()):
            return f"tests: item {number} is {str(test)[:80]!r}, {need}"
    return ""
