"""What the kernels become on GPUs that are not here, read from their binaries: no spills, 16-byte loads and stores."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton not installed")


@pytest.fixture(scope="module")
def binaries():
    """[{kernel, capability, registers, stack, local, ...}], compiled in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), *filter(None, [environment.get("PYTHONPATH")])])
    process = subprocess.run(
        [sys.executable, HERE / "aot_report.py"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(process.stdout)


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_no_kernel_spills(capability, binaries):
    mine = [binary for binary in binaries if binary["capability"] == capability]
    assert len(mine) >= 7
    for binary in mine:
        assert binary["stack"] == binary["local"] == binary["spills"] == 0, binary


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_logits_move_sixteen_bytes_at_a_time(capability, binaries):
    for name, loads, stores in (("statistics", True, False), ("gradient", True, True)):
        mine = [x for x in binaries if x["capability"] == capability and x["kernel"].startswith(name)]
        assert len(mine) == 2
        for binary in mine:
            assert not loads or binary.get("load16", 0) >= 2, binary
            assert not stores or binary.get("store16", 0) >= 2, binary


def test_four_blocks_of_the_softmax_fit_a_multiprocessor(binaries):
    """65,536 registers and 256 threads a block: up to 64 registers a thread leave room for four."""
    for binary in binaries:
        if binary["kernel"].startswith(("statistics", "gradient")):
            assert binary["registers"] <= 64, binary
