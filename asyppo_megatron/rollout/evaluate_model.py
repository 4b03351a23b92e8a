"""Evaluation of a finished model, without a run: the same engine, prompts, verifiers and scoring as in training."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

from asyppo_megatron.config import Config, ConfigError
from asyppo_megatron.models.spec import ModelSpec
from asyppo_megatron.rewards import build_rewards
from asyppo_megatron.rollout.driver import build_embedded_engine
from asyppo_megatron.rollout.evaluate import EvalResult, check_set_name, evaluate_set, write_rows
from asyppo_megatron.rollout.problems import build_eval_problems
from asyppo_megatron.rollout.scoring import Scorer
from asyppo_megatron.rollout.tokenizer import find_stop_tokens, load_tokenizer

logger = logging.getLogger(__name__)


def evaluate_model(config: Config, model_dir: Path, out: Path | None = None) -> list[EvalResult]:
    """Evaluate a Hugging Face model on every `data.eval` set, with `eval`'s settings.

    A set's results lie in `out`/<set>.jsonl as soon as it is done. Of the configuration only `data`, `eval`, `rollout`,
    `reward`, `seed` and the actor's precision matter; the models that it names need not exist.

    Args:
        config: of the run, or any that names the sets.
        model_dir: Hugging Face directory.
        out: directory for the per-problem results; `run_dir`/eval/<name of model_dir> by default.

    Raises:
        ConfigError: a missing file, no set, nothing to do; before any weight is read.
    """
    tokenizer_dir = _tokenizer_dir(config, model_dir)
    errors = _errors(config, model_dir, tokenizer_dir)
    if errors:
        raise ConfigError(errors)
    out = out or config.run_dir / "eval" / model_dir.resolve().name
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(len(os.sched_getaffinity(0)))  # this process has the machine to itself, unlike a run's
    tokenizer = load_tokenizer(tokenizer_dir)
    sets = {e.name: build_eval_problems(config, tokenizer, e) for e in config.data.eval}
    stops = find_stop_tokens(tokenizer, model_dir, config.rollout.stop_token_ids)
    scorer = None
    rewards = build_rewards(config, tokenizer)  # their processes import while the weights are read
    try:
        engine = build_embedded_engine(config, model_dir)
        scorer = Scorer(engine, tokenizer, rewards)
        engine.load_pretrained()
        results = []
        for name, problems in sets.items():
            results.append(
                evaluate_set(
                    scorer,
                    problems,
                    name,
                    config.eval,
                    max_new_tokens=config.rollout.max_response_tokens,
                    stop_token_ids=stops,
                    seed=config.seed,
                )
            )
            logger.info("eval: wrote %s", write_rows(out, results[-1]))
        return results
    finally:
        scorer.close() if scorer is not None else rewards.close()


def _tokenizer_dir(config: Config, model_dir: Path) -> Path:
    """`data.tokenizer`, else the model's own, else the actor's: an exported model carries the one it trained with."""
    if config.data.tokenizer is not None:
        return config.data.tokenizer
    return model_dir if _has_tokenizer(model_dir) else config.actor.model


def _has_tokenizer(path: Path) -> bool:
    return any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


def _errors(config: Config, model_dir: Path, tokenizer_dir: Path) -> list[str]:
    """Everything that keeps the evaluation from running, at once."""
    errors: list[str] = []
    limit = config.eval.max_response_tokens or config.rollout.max_response_tokens
    if not model_dir.is_dir():
        errors.append(f"--model: {model_dir} does not exist; train and export first, or give --model another directory")
    else:
        try:
            positions = ModelSpec.from_hf(model_dir).max_position_embeddings
        except ValueError as e:
            errors.append(f"--model: {e}")
        else:
            needed = config.rollout.max_prompt_tokens + limit
            if needed > positions:
                errors.append(
                    f"--model: got {positions} positions, need {needed} for prompt and response; lower "
                    "rollout.max_prompt_tokens or eval.max_response_tokens"
                )
        if not any(model_dir.glob("*.safetensors")):
            errors.append(f"--model: {model_dir} has no *.safetensors file; export the model first")
    if not _has_tokenizer(tokenizer_dir):
        errors.append(f"data.tokenizer: {tokenizer_dir} has no tokenizer.json or tokenizer_config.json")
    if not config.data.eval:
        errors.append("data.eval: got no set, need one; add one, or name it with --set NAME=PATH")
    for item in config.data.eval:
        try:
            check_set_name(item.name)
        except ValueError as e:
            errors.append(str(e))
        if not item.path.is_file():
            errors.append(f"data.eval {item.name}: {item.path} does not exist")
    if not config.eval.greedy and not config.eval.samples:
        errors.append("eval: got greedy false and samples 0, need one of them; give --samples or set eval.greedy=true")
    return errors
