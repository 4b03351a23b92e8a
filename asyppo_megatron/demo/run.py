"""`asyppo demo`: data, base models, then the main job on this machine."""

from __future__ import annotations

import json
import logging
import shutil
import time
from pathlib import Path

import numpy as np
import torch

from asyppo_megatron.config import LayoutConfig, OptimizerConfig, RoleConfig
from asyppo_megatron.demo.prepare import DemoFiles, prepare_demo
from asyppo_megatron.launch.local import run_ranks
from asyppo_megatron.rollout.tokenizer import load_tokenizer

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
    gpus = torch.cuda.device_count()  # asks the driver's management library, which leaves CUDA alone
    if not gpus:
        import asyppo_megatron.sft  # noqa: F401 - once, for the ranks that are forked
    # In a child: a process that has computed with torch must not fork ranks later.
    initial = {name: directory / f".init-{name}" for name in ("actor", "critic")}
    run_ranks(1, lambda rank: _write_initial(files, initial, seed))
    alone = 0 < gpus < 4  # NCCL wants a GPU a rank
    run_ranks(1 if alone else 4, lambda rank: _train_base_models(initial, directory, examples, seed, alone=alone))
    for path in initial.values():
        shutil.rmtree(path)
    logger.info("demo: made the base models in %.0f s", time.monotonic() - began)
    return files


def _train_base_models(
    initial: dict[str, Path], directory: Path, examples: list[tuple[np.ndarray, np.ndarray]], seed: int, *, alone: bool
) -> None:
    """One rank of the supervised training: the actor on ranks 0-1, the critic on 2-3, or both on rank 0."""
    # Here, since Transformer Engine, which Megatron imports where it is installed, may start CUDA.
    from asyppo_megatron.sft import Example, SupervisedTask, run_supervised

    actor = _role(initial["actor"], (0,) if alone else (0, 1), tp=1 if alone else 2, lr=2e-3)
    critic = _role(initial["critic"], (0,) if alone else (2, 3), tp=1, lr=2e-3)
    tasks = [
        SupervisedTask("actor", actor, directory / "base-actor", ACTOR_STEPS, BATCH),
        SupervisedTask("critic", critic, directory / "base-critic", CRITIC_STEPS, BATCH),
    ]
    run_supervised(tasks, [Example(prompt, response) for prompt, response in examples], seed)


def _role(model: Path, ranks: tuple[int, ...], *, tp: int, lr: float) -> RoleConfig:
    return RoleConfig(
        model=model,
        ranks=ranks,
        layout=LayoutConfig(tp=tp, sequence_parallel=False),
        precision="fp32",
        optimizer=OptimizerConfig(lr=lr, min_lr=lr / 20, beta2=0.98, warmup_steps=20, decay="cosine"),
    )


def _read_examples(files: DemoFiles) -> list[tuple[np.ndarray, np.ndarray]]:
    """Token ids i32 of every (prompt, response)."""
    tokenizer = load_tokenizer(files.tokenizer)
    rows = [json.loads(line) for line in files.supervised.read_text().splitlines()]
    encoded = [tokenizer([r["prompt"] for r in rows]).input_ids, tokenizer([r["response"] for r in rows]).input_ids]
    return [(np.array(p, dtype=np.int32), np.array(r, dtype=np.int32)) for p, r in zip(*encoded, strict=True)]


def _write_initial(files: DemoFiles, targets: dict[str, Path], seed: int) -> None:
    """Randomly initialised Hugging Face models to start the supervised training from."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(1)
    for name, target in targets.items():
        torch.manual_seed(seed)
        source = files.actor if name == "actor" else files.critic
        config = AutoConfig.from_pretrained(source)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(target)
        for file in files.tokenizer.iterdir():
            shutil.copy2(file, target / file.name)
