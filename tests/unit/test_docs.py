"""docs/configuration.md says everything the configuration has, with its default, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from asyppo_megatron import config
from asyppo_megatron.cli import main

DOCS = Path(__file__).resolve().parents[2] / "docs"
ACTOR_ONLY, CRITICS_ONLY = "Actor only:", "Critics only:"
SECTIONS: dict[str, type[BaseModel]] = {
    "## Top level": config.Config,
    "## Roles": config.RoleConfig,
    ACTOR_ONLY: config.ActorConfig,
    CRITICS_ONLY: config.CriticConfig,
    "### `layout`": config.LayoutConfig,
    "### `optimizer`": config.OptimizerConfig,
    "## `reference`": config.ReferenceConfig,
    "## `ppo`": config.PPOConfig,
    "### `ppo.kl`": config.KLConfig,
    "## `filtering`": config.FilteringConfig,
    "## `rollout`": config.RolloutConfig,
    "### `rollout.sglang`": config.SGLangConfig,
    "## `reward`": config.RewardConfig,
    "### `reward.sandbox`": config.SandboxConfig,
    "### `reward.model`": config.RewardModelConfig,
    "## `data`": config.DataConfig,
    "### `data.sources`": config.SourceConfig,
    "### `data.curriculum`": config.CurriculumConfig,
    "### `data.eval`": config.EvalSetConfig,
    "## `eval`": config.EvalConfig,
    "## `checkpoint`": config.CheckpointConfig,
    "## `weight_sync`": config.WeightSyncConfig,
    "## `logging`": config.LoggingConfig,
}


def documented() -> dict[str, dict[str, str]]:
    """Section -> key -> default, as the tables have them."""
    tables: dict[str, dict[str, str]] = {}
    section = ""
    for line in (DOCS / "configuration.md").read_text().splitlines():
        if line.startswith("#") or line in (ACTOR_ONLY, CRITICS_ONLY):
            section = line
        elif match := re.fullmatch(r"\| `(\w+)` \| (.*?) \| .+ \|", line):
            tables.setdefault(section, {})[match[1]] = match[2]
    return tables


def shown(field: Any) -> str:
    """A default as the tables write it."""
    if field.is_required():
        return "required"
    value = field.default
    if isinstance(value, BaseModel):
        return "see below"
    if isinstance(value, tuple):
        return str(list(value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def sections_of(model: type[BaseModel]) -> set[type[BaseModel]]:
    """The sections inside a section, at any depth."""
    found: set[type[BaseModel]] = {model}
    for field in model.model_fields.values():
        for inner in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                found |= sections_of(inner)
    return found


def test_every_section_has_a_table():
    assert sections_of(config.Config) <= set(SECTIONS.values())
    assert set(documented()) == set(SECTIONS)


@pytest.mark.parametrize("section", SECTIONS)
def test_a_table_names_every_key_with_its_default(section: str):
    fields = SECTIONS[section].model_fields
    if section in (ACTOR_ONLY, CRITICS_ONLY):
        fields = {name: field for name, field in fields.items() if name not in config.RoleConfig.model_fields}
    assert documented()[section] == {name: shown(field) for name, field in fields.items()}


def test_the_walk_through_names_only_options_that_exist(capsys: pytest.CaptureFixture[str]):
    text = (DOCS / "real_text.md").read_text()
    for command in ("prepare data", "prepare model", "train", "eval"):
        assert f"asyppo {command}" in text
        with pytest.raises(SystemExit):
            main([*command.split(), "--help"])
        known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
        for block in re.findall(rf"asyppo {command}((?:[^\n]*\\\n)*[^\n]*)", text):
            assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", block)) <= known
