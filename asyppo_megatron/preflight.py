"""What a configuration promises about files: checked before any process or device is touched."""

from __future__ import annotations

from pathlib import Path

from asyppo_megatron.config import Config, ConfigError
from asyppo_megatron.models.spec import ModelSpec


def check_run(config: Config) -> None:
    """Look at every model, layout and dataset that the run names.

    Raises:
        ConfigError: with everything that is missing or does not fit, at once.
    """
    errors: list[str] = []
    specs: dict[str, ModelSpec] = {}
    for name, role in config.roles().items():
        where = name.replace("critic_", "critics.")
        try:
            spec = specs[name] = ModelSpec.from_hf(role.model)
        except ValueError as e:
            errors.append(f"{where}.model: {e}")
            continue
        errors.extend(spec.layout_errors(role.layout, where))
        if not any(role.model.glob("*.safetensors")):
            errors.append(f"{where}.model: {role.model} has no *.safetensors file; convert the checkpoint first")
        limit = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
        if limit > spec.max_position_embeddings:
            errors.append(
                f"{where}.model: got {spec.max_position_embeddings} positions, need {limit} for rollout."
                "max_prompt_tokens + max_response_tokens; lower them or choose another model"
            )
    for name, spec in specs.items():
        if spec.vocab_size < specs["actor"].vocab_size if "actor" in specs else False:
            errors.append(
                f"{name}: got a vocabulary of {spec.vocab_size}, need at least the actor's "
                f"{specs['actor'].vocab_size}; a critic reads the actor's tokens"
            )
    files = [("data.train", config.data.train), *((f"data.eval {e.name}", e.path) for e in config.data.eval)]
    errors.extend(f"{where}: {path} does not exist" for where, path in files if not path.is_file())
    tokenizer = config.data.tokenizer or config.actor.model
    if not _has_tokenizer(tokenizer):
        errors.append(f"data.tokenizer: {tokenizer} has no tokenizer.json or tokenizer_config.json")
    if errors:
        raise ConfigError(errors)


def _has_tokenizer(path: Path) -> bool:
    return any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
