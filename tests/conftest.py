"""Settings of every test run: one thread a process, skips with a reason, and an honest last line."""

from __future__ import annotations

import os

# Before torch is imported, and for the processes that tests start: two threads a process are 10-40 times slower than
# one when several processes share few cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Counting GPUs must not start CUDA: tests fork, and CUDA would not survive it.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import importlib.util
import json
import platform
import sys
import time
from collections import Counter
from importlib import metadata
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

# Markers that make targets leave out, and the target that runs them.
LEFT_OUT = {"slow": "make test-full", "gpu": "make test-gpu"}
_deselected: Counter[str] = Counter()
_started = time.monotonic()


_no_gpu = ""  # why tests that need a GPU are skipped


def pytest_configure(config: pytest.Config) -> None:
    """Only `-m gpu` sees a GPU: every other test is one of the CPU path, with more ranks than there are GPUs."""
    global _no_gpu
    wanted = "gpu" in config.option.markexpr and "not gpu" not in config.option.markexpr
    count = torch.cuda.device_count()
    if not count:
        _no_gpu = "no CUDA device"
    elif not wanted:
        _no_gpu = "runs with -m gpu only (make test-gpu)"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _no_sglang() -> str:
    """Why SGLang is not there, as the set-up wrote it down."""
    try:
        why = json.loads((Path(sys.prefix) / "setup-stamp.json").read_text()).get("sglang_missing")
    except (OSError, ValueError):  # not an environment of tools/setup_env.py
        why = None
    return f"SGLang not installed{f': {why}' if why else ''}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need what this machine lacks are skipped, and say what it is."""
    missing = {}
    if _no_gpu:
        missing["gpu"] = _no_gpu
    if importlib.util.find_spec("sglang") is None:
        missing["sglang"] = _no_sglang()
    for item in items:
        for marker, reason in missing.items():
            if item.get_closest_marker(marker) is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        marker = next((name for name in LEFT_OUT if item.get_closest_marker(name) is not None), "")
        _deselected[marker] += 1


def _lane() -> str:
    """The environment in words: lane, Python, torch, megatron-core."""
    prefix = Path(sys.prefix)
    name = f"{prefix.name} lane" if prefix.parent.name == ".venv" else f"own environment {prefix}"
    try:
        megatron = metadata.version("megatron-core")
    except metadata.PackageNotFoundError:
        megatron = "not installed"
    return f"{name} (Python {platform.python_version()}, torch {torch.__version__}, megatron-core {megatron})"


def _skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


def summary_lines(stats: dict[str, list], seconds: float) -> list[str]:
    """What ran, what did not, and why."""
    counts = ", ".join(
        f"{len(stats[outcome])} {label}"
        for outcome, label in [
            ("passed", "passed"),
            ("failed", "FAILED"),
            ("error", "ERRORS"),
            ("skipped", "skipped"),
            ("xfailed", "expected failures"),
            ("xpassed", "unexpected passes"),
        ]
        if stats.get(outcome)
    )
    lines = [f"{_lane()}: {counts or 'no test ran'} in {seconds:.0f} s"]
    reasons = Counter(_skip_reason(report) for report in stats.get("skipped", []))
    if reasons:
        lines.append("    skipped: " + "; ".join(f"{count} {reason}" for reason, count in reasons.most_common()))
    left_out = [f"{_deselected[name]} {name} ({target})" for name, target in LEFT_OUT.items() if _deselected[name]]
    if _deselected[""]:
        left_out.append(f"{_deselected['']} by the command line")
    if left_out:
        lines.append("    left out: " + "; ".join(left_out))
    return lines


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the summary, and append it to the file that `make test` shows at its very end."""
    lines = summary_lines(terminalreporter.stats, time.monotonic() - _started)
    terminalreporter.section("what ran", sep="-")
    for line in lines:
        terminalreporter.write_line(line)
    if path := os.environ.get("ASYPPO_TEST_SUMMARY"):
        with open(path, "a") as out:
            out.writelines(line + "\n" for line in lines)
