"""Real SGLang servers for tests, started as the product starts them, with the stand-in for SGLang's CPU kernels."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from asyppo_megatron.config import Config, build_config
from asyppo_megatron.launch.engine_command import engine_command
from asyppo_megatron.launch.engine_process import EngineProcess, free_port, server_info, version_error

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = Path(__file__).resolve().parent / "stand_in"
START_S = 900.0  # 22 s on a quiet machine; minutes where six processes want each core
VOCABULARY, END = 512, 258


def engine_environment(**more: str) -> dict[str, str]:
    """The environment in which an engine, or an agent that starts engines, finds the stand-in."""
    path = os.pathsep.join(filter(None, [str(STAND_IN), str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="") | more


def run_config(
    model: Path, run_dir: Path, urls: Sequence[str] = (), *, sglang: Mapping[str, Any] | None = None, **rollout: Any
) -> Config:
    """A run of the tiny model, with engines of its own of the small sizes of tests, or through the servers of `urls`.

    Args:
        sglang: keys of rollout.sglang.
        rollout: keys of rollout beside it.
    """
    small = {"max_total_tokens": 8192, "context_length": 1024, "mem_fraction": 0.5, "max_concurrency": 16}
    if urls:  # one of them may fail: impatient, but not with a slow machine
        small |= {"health_interval_s": 1.0, "health_timeout_s": 5.0, "patience_s": 120.0}
    role = {"model": str(model), "precision": "fp32"}
    tree = {
        "run_dir": str(run_dir),
        "num_steps": 3,
        "actor": role,
        "critics": [role, role],
        "rollout": {
            "engine": "sglang",
            "prompts_per_step": 3,
            "responses_per_prompt": 4,
            "max_prompt_tokens": 16,
            "max_response_tokens": 24,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "sglang": {"urls": list(urls), "kept_mass_every": 2, **small, **(sglang or {})},
            **rollout,
        },
        "reward": {"kind": "exact", "answer_pattern": "([a-m])"},
        "data": {"train": str(run_dir.with_suffix(".jsonl")), "chat_template": "none"},
        "checkpoint": {"every": 1, "keep": 10, "export_hf": False},
    }
    return build_config(tree)


@dataclass
class EngineServer:
    """A running server. model: the Hugging Face directory it was started with."""

    url: str
    model: Path
    tp: int
    process: EngineProcess

    @property
    def log(self) -> Path:
        return self.process.log

    def get(self, path: str, timeout_s: float = 120.0) -> Any:
        answer = requests.get(self.url + path, timeout=timeout_s)
        assert answer.status_code == 200, f"{path}: {answer.status_code} {answer.text[:500]}\n{self.process.log_tail()}"
        return answer.json()

    def post(self, path: str, timeout_s: float = 120.0, **body: Any) -> Any:
        answer = requests.post(self.url + path, json=body, timeout=timeout_s)
        assert answer.status_code == 200, f"{path}: {answer.status_code} {answer.text[:500]}\n{self.process.log_tail()}"
        return answer.json() if "json" in answer.headers.get("content-type", "") else answer.text

    def generate(self, input_ids: list[int] | list[list[int]], timeout_s: float = 120.0, **sampling: Any) -> Any:
        """`/generate` with token logprobs."""
        body = {"input_ids": input_ids, "sampling_params": sampling, "return_logprob": True}
        return self.post("/generate", timeout_s, **body)

    def close(self) -> None:
        self.process.close()


def start_engine(model: Path, directory: Path, *, index: int = 0, wait: bool = True, **sglang: Any) -> EngineServer:
    """Start one more server (22-70 s, 0.7 GB a process): sparingly, and close it.

    Args:
        model: Hugging Face directory.
        directory: for its log, `engine-<index>.log`.
        wait: until it is ready; else the caller does with `wait_until_ready`, having started others.
        sglang: keys of rollout.sglang, as `tp=2`.
    """
    config = run_config(model, directory, sglang=sglang)
    port = free_port("127.0.0.1")
    command = engine_command(config, index, port, 0, engine_environment())
    process = EngineProcess(command, f"http://127.0.0.1:{port}", directory / f"engine-{index}.log")
    server = EngineServer(process.url, model, config.rollout.sglang.tp, process)
    if wait:
        wait_until_ready(server)
    return server


def wait_until_ready(server: EngineServer, limit_s: float = START_S) -> None:
    """Return when the server answers; end it and fail when it has ended or does not in time."""
    deadline = time.monotonic() + limit_s
    while True:
        try:
            info = server_info(server.url, 60)
            break
        except OSError as e:
            code = server.process.exit_code()
            if code is not None or time.monotonic() > deadline:
                server.close()
                what = "not ready in time" if code is None else f"ended with exit code {code}"
                raise AssertionError(f"engine {server.url}: {what} ({e})\n{server.process.log_tail()}") from e
        time.sleep(0.5)
    assert version_error(server.url, info) == ""


def make_tiny_model(directory: Path, family: str = "qwen3", *, tied: bool = False, seed: int = 0) -> Path:
    """Save a random model of some 100,000 parameters with a byte tokenizer, as `asyppo convert` exports it.

    `directory` is its way to Megatron (tp 2) and back; the original lies beside it (`original_of`).

    Its sizes divide by tp 2 everywhere. It is made in a process of its own: tests may fork, which a process that has
    computed with torch should not.
    """
    script = Path(__file__).resolve().parent / "make_tiny_model.py"
    command = [sys.executable, str(script), str(directory), family, str(int(tied)), str(seed)]
    subprocess.run(command, check=True, capture_output=True, timeout=300, env=engine_environment())
    return directory


def original_of(directory: Path) -> Path:
    """The model that `make_tiny_model` made `directory` from."""
    return directory.with_name(f"{directory.name}-original")


def logprob_error(server: EngineServer, reference: Path, num_tokens: int = 24) -> float:
    """Largest |logprob of the engine - of the Hugging Face model| over sampled tokens, nats."""
    import torch
    from transformers import AutoModelForCausalLM

    prompt = [10, 20, 30, 40]
    answer = server.generate(prompt, max_new_tokens=num_tokens, temperature=1.0, ignore_eos=True)
    tokens = answer["output_ids"]
    assert len(tokens) == num_tokens
    got = torch.tensor([entry[0] for entry in answer["meta_info"]["output_token_logprobs"]])
    model = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]
    return (got - expected).abs().max().item()
