"""What a configuration promises about files: checked before any process or device is touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from asyppo_megatron.config import Config, ConfigError
from asyppo_megatron.models.spec import ModelSpec
from asyppo_megatron.rewards.check import reward_errors
from asyppo_megatron.rollout.dataset import Row, read_rows
from asyppo_megatron.rollout.problems import row_check


def check_run(config: Config) -> None:
    """Look at every model, layout and dataset that the run names.

    Raises:
        ConfigError: with everything that is missing or does not fit, at once.
    """
    errors = _model_errors(config)
    errors.extend(_staleness_errors(config))
    errors.extend(_kernel_errors(config.kernels))
    train = [(f"data.sources {s.name}" if config.data.sources else "data.train", s) for s in config.data.all_sources]
    for where, item in [*train, *((f"data.eval {e.name}", e) for e in config.data.eval)]:
        errors.extend(_dataset_errors(where, item.path, row_check(config, item)))
    errors.extend(reward_errors(config))
    tokenizer = config.data.tokenizer or config.actor.model
    if not _has_tokenizer(tokenizer):
        errors.append(f"data.tokenizer: {tokenizer} has no tokenizer.json or tokenizer_config.json")
    if errors:
        raise ConfigError(errors)


def _staleness_errors(config: Config) -> list[str]:
    rollout = config.rollout
    if not rollout.max_staleness or rollout.engine != "embedded" or rollout.partial:
        return []
    if not _has_gpu():
        return []
    return [
        f"rollout.max_staleness: got {rollout.max_staleness} with engine embedded on a GPU that the ranks train on, "
        "need engines on devices of their own; set rollout.engine sglang, or rollout.partial"
    ]


def _has_gpu() -> bool:
    from asyppo_megatron.backend import has_gpu  # imports torch, which a check of files does without

    return has_gpu()


def _kernel_errors(choice: str) -> list[str]:
    """Kernels that the configuration asks for, or that a GPU brings along, where they cannot run."""
    from asyppo_megatron.kernels.policy import chosen_name

    try:
        chosen_name("cuda" if _has_gpu() else "cpu", choice)
    except ValueError as e:
        return [str(e)]
    return []


def _model_errors(config: Config) -> list[str]:
    errors: list[str] = []
    models = [(name.replace("critic_", "critics."), role.model, role.layout) for name, role in config.roles().items()]
    if config.uses_reference and config.reference.model is not None:
        models.append(("reference", config.reference.model, config.actor.layout))
    limit = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    vocabulary = 0  # of the actor, which comes first
    for where, path, layout in models:
        try:
            spec = ModelSpec.from_hf(path)
        except ValueError as e:
            errors.append(f"{where}.model: {e}")
            continue
        if spec.num_experts:
            errors.append(f"{where}.model: got a mixture of experts, need a dense model; those are only converted")
        errors.extend(spec.layout_errors(layout, where))
        errors.extend(_weight_errors(where, path, spec))
        if limit > spec.max_position_embeddings:
            errors.append(
                f"{where}.model: got {spec.max_position_embeddings} positions, need {limit} for rollout."
                "max_prompt_tokens + max_response_tokens; lower them or choose another model"
            )
        if where == "actor":
            vocabulary = spec.vocab_size
        if spec.vocab_size < vocabulary:
            errors.append(
                f"{where}.model: got a vocabulary of {spec.vocab_size}, need at least the actor's {vocabulary}; "
                "it reads the actor's tokens"
            )
    return errors


def _weight_errors(where: str, path: Path, spec: ModelSpec) -> list[str]:
    """Every name, shape and byte count of a checkpoint; only the headers of its files are read."""
    if not any(path.glob("*.safetensors")):
        return [f"{where}.model: {path} has no *.safetensors file; convert the checkpoint first"]
    from asyppo_megatron.convert.hf_io import HFCheckpoint, check_checkpoint  # needs torch, which not every check has

    try:
        check_checkpoint(HFCheckpoint(path), spec, "critic" if where.startswith("critics") else "actor")
    except ValueError as e:
        return [f"{where}.model: {e}"]
    return []


def _dataset_errors(where: str, path: Path, check: Callable[[Row], str]) -> list[str]:
    if not path.is_file():
        return [f"{where}: {path} does not exist"]
    try:
        read_rows(path, check=check)
    except ValueError as e:
        return [f"{where}: {line}" for line in str(e).splitlines()]
    return []


def _has_tokenizer(path: Path) -> bool:
    return any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
