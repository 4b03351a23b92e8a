"""What the end-to-end tests share: a configuration, tiny models, and commands in processes that must end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

from asyppo_megatron.demo import prepare, task
from asyppo_megatron.observability.metrics import Row, read_metrics

ROOT = Path(__file__).resolve().parents[2]
MARKER = "ASYPPO_TEST_RUN"  # in the environment of every process that a command starts, itself included
LIMIT_S = 180.0
DEMO_LIMIT_S = 1200.0
STEP = re.compile(r"step (\d+)/\d+  reward")
NUM_STEPS = 6
CHECKPOINTS = 2  # steps between two


def tree(data: Path, run_dir: Path) -> dict[str, Any]:
    """A configuration: actor TP 2 on ranks 0-1, critics on 2 and 3, each role with a schedule of its own."""

    def role(model: str, ranks: str, **optimizer: Any) -> dict[str, Any]:
        settings = {"beta2": 0.98, "min_lr": 1e-5, **optimizer}
        return {"model": str(data / model), "ranks": ranks, "precision": "fp32", "optimizer": settings}

    return {
        "run_dir": str(run_dir),
        "seed": 3,
        "num_steps": NUM_STEPS,
        "actor": role("actor", "0-1", lr=5e-3, warmup_steps=3, decay="cosine")
        | {"layout": {"tp": 2}, "mini_batch_size": 8},
        "critics": [
            role("critic", "2", lr=3e-3, warmup_steps=2, decay="linear"),
            role("critic", "3", lr=1e-3, warmup_steps=4) | {"mini_batch_size": 4},
        ],
        "rollout": {
            "prompts_per_step": 4,
            "responses_per_prompt": 4,
            "max_prompt_tokens": 11,  # chains of five operators have 13
            "max_response_tokens": 8,
            "temperature": 1.0,
            "top_p": 0.95,
            "top_k": 12,
        },
        # The last digit of what random weights write is the answer often enough for rewards to differ.
        "reward": {"kind": "exact", "answer_pattern": "([0-9])"},
        "data": {
            "train": str(data / "rl_train.jsonl"),
            "eval": [{"name": "heldout", "path": str(data / "heldout.jsonl")}],
            "tokenizer": str(data / "tokenizer"),
            "chat_template": "none",
        },
        "eval": {"every": 3, "samples": 2},
        "checkpoint": {"every": CHECKPOINTS},
    }


def init_model(directory: Path, hidden: int, seed: int) -> None:
    """A random Qwen3 over the demo's vocabulary."""
    torch.manual_seed(seed)
    end = task.VOCABULARY.index(task.END)
    config = Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=len(task.VOCABULARY),
        hidden_size=hidden,
        head_dim=8,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.3,
        eos_token_id=end,
        pad_token_id=end,
        bos_token_id=None,
        dtype="float32",
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)


def make_data(directory: Path) -> Path:
    """Tokenizer, problems, and the models `actor` and `critic`."""
    with pytest.MonkeyPatch.context() as patch:
        for name, count in (("NUM_SUPERVISED", 8), ("NUM_TRAIN", 64), ("NUM_HELD_OUT", 12)):
            patch.setattr(prepare, name, count)
        prepare.prepare_demo(directory)
    disable_progress_bar()
    init_model(directory / "actor", hidden=32, seed=0)
    init_model(directory / "critic", hidden=16, seed=1)
    return directory


class Command:
    """`python -m asyppo_megatron ...` under way, in a session of its own."""

    def __init__(self, arguments: list[str], directory: Path, **environment: str):
        self.name = uuid.uuid4().hex
        self.run_dir = directory
        self._out, self._err = directory.parent / f"{self.name}.out", directory.parent / f"{self.name}.err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "asyppo_megatron", *arguments],
                cwd=ROOT,
                env={**os.environ, MARKER: self.name, **environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def wait(self, limit_s: float = LIMIT_S) -> int:
        """The exit code, once it and everything it started have ended."""
        try:
            code = self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"did not end within {limit_s:.0f} s:\n{self.err}")
        deadline = time.monotonic() + 5
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not left, f"left behind: {[(p.pid, p.cmdline()) for p in left]}\n{self.err}"
        return code

    def wait_until(self, condition: Callable[[], Any], what: str) -> None:
        """Poll while the command runs."""
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            assert self.process.poll() is None, f"ended before {what}:\n{self.err}"
            assert time.monotonic() < deadline, f"{what}: not within {LIMIT_S:.0f} s\n{self.err}"
            time.sleep(0.005)

    def wait_for_step(self, step: int) -> None:
        """Until this start of the run has logged a step (of earlier starts the metrics may have later ones)."""
        self.wait_until(lambda: any(int(n) >= step for n in STEP.findall(self.err)), f"step {step}")

    def processes(self) -> list[psutil.Process]:
        """Everything that carries the command's marker and is not a zombie."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARKER) == self.name and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def pid_of(self, who: str) -> int:
        """Process of `launcher`, `rank-00003` or `driver`: the oldest whose stderr is that log."""
        if who == "launcher":
            return self.process.pid
        log = str(self.run_dir / "logs" / f"{who}.log")
        return min(p.pid for p in self.processes() if os.readlink(f"/proc/{p.pid}/fd/2") == log)

    def end(self) -> None:
        """SIGKILL to all that is left."""
        for process in self.processes():
            process.kill()
        self.process.wait()


TIMES = re.compile(r"seconds|memory/|tokens_per_second")


def trajectory(run_dir: Path) -> list[Row]:
    """All rows of a run, without what depends on the machine's mood."""
    rows = [{name: v for name, v in row.items() if not TIMES.search(name)} for row in read_metrics(run_dir)]
    return sorted(rows, key=lambda row: (row["step"], "reward" not in row))


def steps(path: Path) -> list[Row]:
    """Rows of training steps."""
    return [row for row in read_metrics(path) if "reward" in row]


class Asyppo:
    """Starts commands, and ends those that a failed test leaves behind."""

    def __init__(self, data: Path):
        self.data = data
        self._started: list[Command] = []

    def config(self, run_dir: Path) -> Path:
        """The configuration file of a run, beside its directory."""
        path = run_dir.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(tree(self.data, run_dir)))
        return path

    def start(self, run_dir: Path, *overrides: str, command: str = "train", **environment: str) -> Command:
        arguments = [command, str(self.config(run_dir)), *overrides]
        self._started.append(Command(arguments, run_dir, **environment))
        return self._started[-1]

    def train(self, run_dir: Path, *overrides: str, **environment: str) -> Command:
        """A run that must succeed."""
        command = self.start(run_dir, *overrides, **environment)
        assert command.wait() == 0, command.err
        return command

    def demo(self, run_dir: Path, *arguments: str) -> Command:
        """The demo, with a configuration and limits of its own."""
        command = Command(["demo", *arguments], run_dir)
        self._started.append(command)
        assert command.wait(DEMO_LIMIT_S) == 0, command.err
        return command

    def refuse(self, run_dir: Path, *overrides: str) -> str:
        """A command that must be refused before anything is written or started; its message."""
        command = self.start(run_dir, *overrides)
        assert command.wait() == 1, command.err
        assert not run_dir.exists()
        assert "Traceback" not in command.err
        return command.err

    def close(self) -> None:
        for command in self._started:
            command.end()


def checkpoint(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:06d}"


def saved_steps(run_dir: Path) -> list[int]:
    """Steps of the complete checkpoints (without the product's own function: it imports Megatron)."""
    return sorted(int(path.name.removeprefix("step-")) for path in run_dir.glob("checkpoints/step-*"))


def stop(command: Command, who: str, sig: signal.Signals = signal.SIGKILL) -> None:
    os.kill(command.pid_of(who), sig)
