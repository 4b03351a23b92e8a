"""YAML and `key=value` overrides in, a validated `Config` or one list of all errors out."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from asyppo_megatron.config.checks import cross_checks
from asyppo_megatron.config.methods import resolve, select_critics
from asyppo_megatron.config.model_files import expand_models
from asyppo_megatron.config.run import Config


class ConfigError(ValueError):
    """Everything wrong with a configuration, at once.

    Attributes:
        errors: one line each: what was found, what is needed, what to do.
    """

    def __init__(self, errors: list[str]):
        self.errors = errors
        super().__init__("\n".join(f"  - {e}" for e in errors))


def _known_keys(path: tuple[Any, ...]) -> list[str]:
    """Field names of the section that a location of a pydantic error lies in."""
    model: Any = Config
    for part in path:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part) if isinstance(model, type) and issubclass(model, BaseModel) else None
        if field is None:
            return []
        model = field.annotation
        for arg in get_args(model):
            if isinstance(arg, type) and issubclass(arg, BaseModel):
                model = arg
    return list(getattr(model, "model_fields", {}))


def _describe(error: Any) -> str:
    where = ".".join(str(p) for p in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _known_keys(tuple(error["loc"][:-1]))
        close = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
        return f"{where}: unknown key; {hint}"
    if error["type"] == "missing":
        return f"{where}: missing, need a value"
    return f"{where}: {error['msg'].removeprefix('Value error, ')} (got {error['input']!r})"


def parse_override(text: str) -> tuple[list[str], Any]:
    """`a.b.0.c=value` to its path and its YAML value."""
    key, sep, value = text.partition("=")
    if not sep or not key:
        raise ConfigError([f"override: got {text!r}, need key=value"])
    try:
        return key.split("."), yaml.safe_load(value) if value else ""
    except yaml.YAMLError as e:
        raise ConfigError([f"override {key}: value {value!r} is not YAML: {e}"]) from e


def apply_override(tree: Any, path: list[str], value: Any, full: str = "") -> None:
    """Set one value in a tree of dicts and lists; `*` stands for every item of a list."""
    full = full or ".".join(path)
    head, rest = path[0], path[1:]
    if isinstance(tree, list):
        if head != "*" and not (head.isdigit() and int(head) < len(tree)):
            raise ConfigError([f"override {full}: got index {head!r}, need 0..{len(tree) - 1} or *"])
        for i in range(len(tree)) if head == "*" else [int(head)]:
            if rest:
                apply_override(tree[i], rest, value, full)
            else:
                tree[i] = value
        return
    if not isinstance(tree, dict):
        raise ConfigError([f"override {full}: {head!r} lies inside a plain value"])
    if rest:
        if not isinstance(tree.get(head), dict | list):
            tree[head] = {}
        apply_override(tree[head], rest, value, full)
    else:
        tree[head] = value


def load_config(path: Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply overrides and validate.

    Raises:
        ConfigError: with all errors at once.
    """
    tree = _read_tree(path, ())
    tree, errors = expand_models(tree, path.parent)
    if errors:
        raise ConfigError(errors)
    for text in overrides or []:
        apply_override(tree, *parse_override(text))
    return build_config(tree)


def _read_tree(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """A file's tree laid over that of its `base`: sections merge, anything else (a list, a value) is replaced."""
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as e:
        raise ConfigError([f"{path}: cannot be read: {e.strerror}"]) from e
    except yaml.YAMLError as e:
        raise ConfigError([f"{path}: is not YAML: {e}"]) from e
    if not isinstance(tree, dict):
        raise ConfigError([f"{path}: got {type(tree).__name__}, need a mapping of sections"])
    tree.pop("definitions", None)  # a place for YAML anchors
    base = tree.pop("base", None)
    if base is None:
        return tree
    other = path.parent / str(base)
    if other.resolve() in seen or other.parent.resolve() != path.parent.resolve():
        raise ConfigError([f"{path}: base: got {base!r}, need another file of the same directory, and no circle"])
    return _merged(_read_tree(other, (*seen, path.resolve())), tree)


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {k: _merged(under[k], v) for k, v in over.items() if isinstance(v, dict) and isinstance(under.get(k), dict)}
    return {**under, **over, **both}


def build_config(tree: dict[str, Any]) -> Config:
    """Validate a plain tree.

    Raises:
        ConfigError: with all errors at once.
    """
    tree, contradictions = resolve(tree)
    try:
        config = Config.model_validate(tree)
    except ValidationError as e:
        raise ConfigError([*contradictions, *(_describe(err) for err in e.errors())]) from None
    config, unusable = select_critics(config)
    errors = [*contradictions, *unusable] or cross_checks(config)
    if errors:
        raise ConfigError(errors)
    return config


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; `load_config` reads it back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
