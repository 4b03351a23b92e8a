"""`asyppo demo`: data, base models, then the main job on this machine."""

from __future__ import annotations

import json
import logging
import shutil
import time
from pathlib import Path

import numpy as np

from asyppo_megatron.config import LayoutConfig, OptimizerConfig, RoleConfig
from asyppo_megatron.demo.prepare import DemoFiles, prepare_demo
from asyppo_megatron.launch.local import run_ranks
from asyppo_megatron.rollout.tokenizer import load_tokenizer
from asyppo_megatron.sft import Example, SupervisedTask, run_supervised

logger = logging.getLogger(__name__)

ACTOR_STEPS, CRITIC_STEPS, BATCH = 600, 600, 128


def prepare_base_models(directory: Path, seed: int = 0) -> DemoFiles:
    """Problems, tokenizer, and the supervised base models of actor and critics; cached in `directory`.

    The base models do not depend on the run's seed: runs with different seeds start from the same policy.
    """
    files = prepare_demo(directory, seed)
    actor, critic = directory / "base-actor", directory / "base-critic"
    if (actor / "config.json").is_file() and (critic / "config.json").is_file():
        logger.info("demo: base models are there already (%s)", directory)
        return files
    began = time.monotonic()
    examples = _read_examples(files)
    initial = {name: directory / f".init-{name}" for name in ("actor", "critic")}
    tasks = [
        SupervisedTask("actor", _role(initial["actor"], (0, 1), tp=2, lr=2e-3), actor, ACTOR_STEPS, BATCH),
        SupervisedTask("critic", _role(initial["critic"], (2, 3), tp=1, lr=2e-3), critic, CRITIC_STEPS, BATCH),
    ]
    # In a child: a process that has computed with torch must not fork ranks later.
    run_ranks(1, lambda rank: _write_initial(files, initial, seed))
    run_ranks(4, lambda rank: run_supervised(tasks, examples, seed))
    for path in initial.values():
        shutil.rmtree(path)
    logger.info("demo: made the base models in %.0f s", time.monotonic() - began)
    return files


def _role(model: Path, ranks: tuple[int, ...], *, tp: int, lr: float) -> RoleConfig:
    return RoleConfig(
        model=model,
        ranks=ranks,
        layout=LayoutConfig(tp=tp, sequence_parallel=False),
        precision="fp32",
        optimizer=OptimizerConfig(lr=lr, min_lr=lr / 20, beta2=0.98, warmup_steps=20, decay="cosine"),
    )


def _read_examples(files: DemoFiles) -> list[Example]:
    tokenizer = load_tokenizer(files.tokenizer)
    rows = [json.loads(line) for line in files.supervised.read_text().splitlines()]
    encoded = [tokenizer([r["prompt"] for r in rows]).input_ids, tokenizer([r["response"] for r in rows]).input_ids]
    return [Example(np.array(p, dtype=np.int32), np.array(r, dtype=np.int32)) for p, r in zip(*encoded, strict=True)]


def _write_initial(files: DemoFiles, targets: dict[str, Path], seed: int) -> None:
    """Randomly initialised Hugging Face models to start the supervised training from."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(1)
    for name, target in targets.items():
        torch.manual_seed(seed)
        source = files.actor if name == "actor" else files.critic
        config = AutoConfig.from_pretrained(source)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(target)
        for file in files.tokenizer.iterdir():
            shutil.copy2(file, target / file.name)
