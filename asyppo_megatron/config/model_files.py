"""Model files: what a role needs to know about an architecture, written once and named by `model_file`.

A file holds `architecture` (the keys of the model's config.json), `role` (defaults of any role that trains it) and
`layouts` (parallel layouts by name). A role that names the file gets the defaults; its own keys win; a `layout` that is
a word is looked up.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

_KEYS = {"architecture", "role", "layouts"}


def read_model_file(path: Path) -> dict[str, Any]:
    """The sections of a model file.

    Raises:
        ValueError: unreadable, not YAML, or with other sections.
    """
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as e:
        raise ValueError(f"{path}: got {e.strerror}, need a readable model file; see model_configs/") from e
    except yaml.YAMLError as e:
        raise ValueError(f"{path}: is not YAML: {e}") from e
    if not isinstance(tree, dict) or set(tree) - _KEYS or not isinstance(tree.get("architecture"), dict):
        raise ValueError(f"{path}: got no model file, need `architecture`, and `role` and `layouts` if wanted")
    return tree


def expand_models(tree: dict[str, Any], directory: Path) -> tuple[dict[str, Any], list[str]]:
    """A configuration's tree with the model files of its roles filled in, and what is wrong with them.

    Args:
        directory: of the configuration's file; relative paths of `model_file` start there.
    """
    tree, errors = deepcopy(tree), []
    critics = tree.get("critics")
    roles = [("actor", tree.get("actor"))]
    roles += [(f"critics.{i}", c) for i, c in enumerate(critics if isinstance(critics, list) else [])]
    for where, role in roles:
        if isinstance(role, dict) and isinstance(role.get("model_file"), str):
            try:
                _expand(role, directory)
            except ValueError as e:
                errors.append(f"{where}.model_file: {e}")
    return tree, errors


def _expand(role: dict[str, Any], directory: Path) -> None:
    path = directory / role["model_file"]
    model = read_model_file(path)
    role["model_file"] = str(path.resolve())
    for key, value in (model.get("role") or {}).items():
        if isinstance(value, dict) and isinstance(role.get(key), dict):
            role[key] = {**value, **role[key]}
        else:
            role.setdefault(key, value)
    if isinstance(role.get("layout"), str):
        layouts = model.get("layouts") or {}
        if role["layout"] not in layouts:
            raise ValueError(f"{path}: got layout {role['layout']!r}, need one of {', '.join(layouts)}")
        role["layout"] = layouts[role["layout"]]
