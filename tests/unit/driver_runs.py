"""What the driver's tests share: a tiny demo with random weights, a configuration, and processes that end."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3ForCausalLM

from asyppo_megatron.config import Config, build_config
from asyppo_megatron.demo import prepare
from asyppo_megatron.rollout.client import DriverHandle, start_driver
from asyppo_megatron.rollout.engine import write_weights_manifest

GROUPS, SAMPLES = 3, 4


def make_demo(directory: Path) -> Path:
    """The demo's files, with two versions of random weights in `w0` and `w1` and one that is not finite in `w2`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "NUM_SUPERVISED", 20)
        patch.setattr(prepare, "NUM_TRAIN", 20)
        patch.setattr(prepare, "NUM_HELD_OUT", 6)
        files = prepare.prepare_demo(directory)
    config = prepare.critic_config()
    for version in range(3):
        torch.manual_seed(version)
        target = directory / f"w{version}"
        Qwen3ForCausalLM(config).save_pretrained(target)
        if version == 2:
            tensors = load_file(target / "model.safetensors")
            tensors["lm_head.weight"].fill_(float("nan"))
            save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        write_weights_manifest(target, version, ["model.safetensors"])
    return files.directory


def configure(demo: Path, **sections) -> Config:
    tree = {
        "seed": 5,
        "actor": {"model": str(demo / "critic"), "precision": "fp32"},
        "critics": [{"model": str(demo / "critic")}] * 2,
        "rollout": {
            "prompts_per_step": GROUPS,
            "responses_per_prompt": SAMPLES,
            "max_prompt_tokens": 16,
            "max_response_tokens": 12,
            "temperature": 1.0,
            "top_p": 0.95,
            "top_k": 8,
            "max_batch": 8,
        },
        "reward": {"kind": "exact"},
        "data": {
            "train": str(demo / "rl_train.jsonl"),
            "eval": [{"name": "heldout", "path": str(demo / "heldout.jsonl")}],
            "tokenizer": str(demo / "tokenizer"),
            "chat_template": "none",
        },
        "eval": {"samples": 2},
    }
    for name, values in sections.items():
        tree[name] = {**tree[name], **values} if isinstance(tree.get(name), dict) else values
    return build_config(tree)


class Drivers:
    """Starts drivers and ends those that a test leaves behind."""

    def __init__(self):
        self._handles: list[DriverHandle] = []

    def start(self, config: Config, run_dir: Path) -> DriverHandle:
        handle = start_driver(config, run_dir)
        self._handles.append(handle)
        return handle

    def close(self):
        for handle in self._handles:
            handle.close()


def copy_of(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in arrays.items()}


def assert_equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def wait_until(condition, what: str, seconds: float = 20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()
