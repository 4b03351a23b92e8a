"""Ranks on this machine: they end together, one message says why, and the rest is in the log files."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# What every rank does, by name; `store` is the run's key-value store.
CASES = {
    "fine": "print('to the log', flush=True)",
    "bug": """
if rank == 1:
    {}['missing']
store.get('never')
""",
    "message": """
if rank == 1:
    raise ValueError('x: got 1, need 2; do that')
store.get('never')
""",
    "explained": "raise RunError('step 3: NaN in critic_1 on rank 3')",
    # The others fail because of it, and may be quicker to say so.
    "killed": """
if rank == 2:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(0.2)
raise ConnectionResetError('connection closed by peer')
""",
    "first": """
if rank == 0:
    raise ConnectionResetError('connection closed by peer')
if rank == 2:
    time.sleep(0.5)
time.sleep(0.3)
raise ValueError('later')
""",
    "exit": "sys.exit(7 if rank == 0 else 0)",
    "forever": "os.write(2, b'ready\\n'); time.sleep(1000)",
    "stubborn": """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if rank == 0:
    time.sleep(0.3)
    raise ValueError('over')
time.sleep(1000)
""",
}
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from asyppo_megatron.launch import local
from asyppo_megatron.types import RunError
import torch.distributed as dist
local._GRACE_S = 0.3

def main(rank):
    store, _, _ = next(dist.rendezvous("env://", rank, 3))
    exec(CODE, {**globals(), "rank": rank, "store": store})

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
try:
    local.run_ranks(3, main, Path(LOGS) if LOGS else None)
except local.RankFailed as e:
    print(f"{e.traceback}{e}", file=sys.stderr)
    sys.exit(1)
except KeyboardInterrupt as e:
    print(f"{type(e).__name__} {e}", file=sys.stderr)
    sys.exit(2)
"""


def start(case: str, logs: Path | None) -> subprocess.Popen:
    program = f"CODE = {CASES[case]!r}\nLOGS = {str(logs) if logs else ''!r}\n{PROGRAM}"
    return subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(case: str, logs: Path | None) -> tuple[int, str, str]:
    """Exit code, stdout and stderr; no process of the session is left."""
    process = start(case, logs)
    out, err = process.communicate(timeout=120)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    return process.returncode, out, err


def test_output_of_ranks_goes_to_their_logs(tmp_path):
    assert run("fine", tmp_path) == (0, "", "")
    assert [(tmp_path / f"rank-{r:05d}.log").read_text() for r in range(3)] == ["to the log\n"] * 3


def test_without_a_log_directory_output_stays_where_it_was():
    assert run("fine", None) == (0, "to the log\n" * 3, "")


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("message", "rank 1 failed: x: got 1, need 2; do that; logs of all ranks: LOGS"),
        ("explained", "step 3: NaN in critic_1 on rank 3; logs of all ranks: LOGS"),
        (
            "killed",
            r"rank 2 \(process \d+\) was killed by SIGKILL, perhaps for lack of memory; logs of all ranks: LOGS",
        ),
        ("first", "rank 0 failed: connection closed by peer; logs of all ranks: LOGS"),
        ("exit", r"rank 0 \(process \d+\) ended with exit code 7; logs of all ranks: LOGS"),
        ("stubborn", "rank 0 failed: over; logs of all ranks: LOGS"),
    ],
)
def test_one_line_says_why_the_ranks_ended(tmp_path, case, message):
    code, out, err = run(case, tmp_path)
    assert (code, out) == (1, "")
    assert re.fullmatch(message.replace("LOGS", str(tmp_path)) + "\n", err), err


def test_an_error_nobody_expected_is_shown_with_its_traceback_once(tmp_path):
    code, _, err = run("bug", tmp_path)
    assert code == 1
    assert err.count("Traceback") == 1
    assert err.splitlines()[-2:] == [
        "KeyError: 'missing'",
        f"rank 1 failed: KeyError: 'missing'; logs of all ranks: {tmp_path}",
    ]
    assert "KeyError: 'missing'" in (tmp_path / "rank-00001.log").read_text()


@pytest.mark.parametrize(("sig", "said"), [(signal.SIGTERM, "Stopped SIGTERM"), (signal.SIGINT, "KeyboardInterrupt ")])
def test_a_signal_to_the_launcher_ends_the_ranks(sig, said, tmp_path):
    process = start("forever", None)
    ready = [process.stderr.readline() for _ in range(3)]
    assert ready == ["ready\n"] * 3
    os.kill(process.pid, sig)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and err == f"{said}\n"
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_ranks_die_with_a_launcher_that_is_killed():
    process = start("forever", None)
    for _ in range(3):
        process.stderr.readline()
    process.kill()
    process.communicate(timeout=60)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    pytest.fail("ranks outlived their launcher")
