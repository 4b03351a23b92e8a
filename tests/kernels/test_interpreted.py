"""Runs `interpreted/` in one process of its own: under Triton's interpreter here, compiled where there is a GPU.

Triton decides at import whether it interprets, so neither the setting nor the import may reach this process.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = sorted(path.stem for path in (HERE / "interpreted").glob("test_*.py"))
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton not installed")


def _run(tmp_path: Path, device: str, **environment: str) -> dict[str, dict[str, str]]:
    """{file: {test: what went wrong, "" where it passed or was skipped}} of all interpreted tests."""
    report = tmp_path / "report.xml"
    base = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "ASYPPO_TEST_SUMMARY")}
    path = os.pathsep.join([str(HERE.parents[1]), *filter(None, [base.get("PYTHONPATH")])])
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", "-p", "no:cacheprovider", "interpreted"],
        cwd=HERE,
        env={**base, "PYTHONPATH": path, "ASYPPO_KERNEL_DEVICE": device, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert report.exists(), process.stdout[-4000:] + process.stderr[-4000:]
    found: dict[str, dict[str, str]] = {name: {} for name in FILES}
    for case in ElementTree.parse(report).iter("testcase"):
        wrong = [child.text or "" for child in case if child.tag in ("failure", "error")]
        found.setdefault(case.get("classname", "").split(".")[-1], {})[case.get("name", "")] = "\n".join(wrong)
    return found


def _check(found: dict[str, dict[str, str]], file: str) -> None:
    assert found[file], f"{file}: no test ran"
    failures = [f"{name}\n{what}" for name, what in found[file].items() if what]
    assert not failures, "\n\n".join(failures)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    return _run(tmp_path_factory.mktemp("interpreted"), "cpu", TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return _run(tmp_path_factory.mktemp("compiled"), "cuda")


@needs_triton
@pytest.mark.parametrize("file", FILES)
def test_interpreted(file, interpreted):
    _check(interpreted, file)


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("file", FILES)
def test_compiled(file, compiled):
    _check(compiled, file)
