"""Imports point down only, and only some packages may know Megatron-Core."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "asyppo_megatron"

# From the top down; a module may import from its own layer and from those below.
LAYERS = [
    {"__main__", "cli", "demo", "train", "run", "world", "sft", "prepare", "preflight", "launch", "plan", "doctor"},
    {"roles", "rollout", "weight_sync", "checkpoint", "observability"},
    {"models", "kernels", "convert", "rewards"},
    {"parallel", "backend", "ppo", "packing"},
    {"types", "config"},
    {"__init__"},  # the package itself: its version, no import
]
MEGATRON = {"parallel.process_groups", "backend", "models", "roles", "convert", "checkpoint"}

# Import names of distributions that are spelled differently, and what comes with a declared one.
IMPORT_NAMES = {"pyyaml": "yaml", "megatron_core": "megatron", "transformer_engine": "transformer_engine"}
COMES_WITH = {"triton": "torch (its CUDA build)", "apex": "NVIDIA's source install, never the package index"}


def layer_of(module: str) -> int:
    """Layer of a dotted module name inside the package."""
    top = module.split(".")[0]
    for index, names in enumerate(LAYERS):
        if top in names:
            return index
    raise AssertionError(f"{PACKAGE}/{top} has no layer: put it into LAYERS of {Path(__file__).name} on purpose")


def module_name(path: Path, root: Path) -> str:
    """`ppo/losses.py` -> `ppo.losses`, `ppo/__init__.py` -> `ppo`, the package's own `__init__.py` -> `__init__`."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imported_names(source: str, module: str, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import, those within functions and under TYPE_CHECKING included.

    `from a.b import c` yields `a.b.c`: whether c is a module or a name in one does not matter to the layers.
    """
    here = [PACKAGE, *([] if module == "__init__" else module.split("."))]
    if not is_package and module != "__init__":
        here = here[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from ((node.lineno, str(arg.value)) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def inside(name: str, prefixes: set[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """Every import of a file that breaks a rule, as a sentence."""
    found = []
    for line, name in imported_names(source, module, is_package):
        top = name.split(".")[0]
        if top == PACKAGE:
            rest = name.split(".", 1)[1] if "." in name else "__init__"
            known = any(rest.split(".")[0] in names for names in LAYERS)
            target = rest if known or "." in rest else "__init__"  # `from asyppo_megatron import __version__`
            if layer_of(target) < layer_of(module):
                found.append(f"{module}:{line} imports {name}, which lies above it")
            if inside(module, {"ppo"}) and not inside(target, {"ppo", "types"}):
                found.append(f"{module}:{line} imports {name}; ppo/ may import torch, types and the standard library")
        elif inside(module, {"ppo"}) and top != "torch" and top not in sys.stdlib_module_names:
            found.append(f"{module}:{line} imports {name}; ppo/ may import torch, types and the standard library")
        elif top == "megatron" and not inside(module, MEGATRON):
            found.append(f"{module}:{line} imports {name}; only {', '.join(sorted(MEGATRON))} may")
    return found


def source_files() -> list[Path]:
    return sorted((ROOT / PACKAGE).rglob("*.py"))


def test_imports_point_down_only():
    root = ROOT / PACKAGE
    found = [
        violation
        for path in source_files()
        for violation in violations(path.read_text(), module_name(path, root), path.name == "__init__.py")
    ]
    assert not found, "\n".join(found)


def test_every_third_party_import_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [
        *project["dependencies"],
        *(r for extra in project["optional-dependencies"].values() for r in extra),
    ]
    distributions = {re.match(r"[\w.-]+", r).group().lower().replace("-", "_") for r in requirements}
    declared = {IMPORT_NAMES.get(name, name) for name in distributions} | set(COMES_WITH)
    undeclared = [
        f"{path.relative_to(ROOT)}:{line} imports {name}, which pyproject.toml does not declare"
        for path in source_files()
        for line, name in imported_names(
            path.read_text(), module_name(path, ROOT / PACKAGE), path.name == "__init__.py"
        )
        if (top := name.split(".")[0]) != PACKAGE and top not in sys.stdlib_module_names and top not in declared
    ]
    assert not undeclared, "\n".join(undeclared)


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("ppo.losses", "import torch\nfrom asyppo_megatron.types import lengths\nimport math", 0),
        ("ppo.losses", "from .ensemble import value_std", 0),
        ("ppo.losses", "import numpy", 1),
        ("ppo.losses", "from asyppo_megatron.config import PPOConfig", 1),
        ("ppo.losses", "from ..packing import pack", 1),
        ("packing", "def f():\n    from asyppo_megatron.roles import actor", 1),
        ("models.gpt", "from asyppo_megatron import roles", 1),
        ("models.gpt", "from asyppo_megatron import __version__", 0),
        ("models.gpt", "from asyppo_megatron.convert import table", 0),
        ("rollout.driver", "from megatron.core import parallel_state", 1),
        ("rollout.driver", "import importlib\nimportlib.import_module('megatron.core')", 1),
        ("parallel.layout", "import megatron.core", 1),
        ("parallel.process_groups", "import megatron.core", 0),
        ("roles.actor", "from megatron.core import optimizer", 0),
    ],
)
def test_the_rules_catch_what_they_should(module: str, source: str, expected: int):
    assert len(violations(source, module)) == expected


def test_relative_imports_of_a_package_start_at_the_package():
    assert list(imported_names("from . import losses", "ppo", is_package=True)) == [(1, "asyppo_megatron.ppo.losses")]
    assert list(imported_names("from .. import roles", "ppo.losses")) == [(1, "asyppo_megatron.roles")]


def test_a_module_without_a_layer_is_refused():
    with pytest.raises(AssertionError, match="has no layer"):
        layer_of("surprise")
