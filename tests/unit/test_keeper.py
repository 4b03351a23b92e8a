"""The keeper leaves no process of its command, however it and its parent end."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from asyppo_megatron.launch import keeper

# Prints its process id and that of a descendant that has left its parent and its session and ignores SIGTERM.
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(
    [sys.executable, "-c", "import os, time; os.setsid(); "
     "pid = os.fork(); pid and (print(pid, flush=True), os._exit(0)); time.sleep(600)"],
)
child.wait()
print(os.getpid(), flush=True)
{then}
"""
LIMIT_S = 60.0


def start(then: str, grace_s: float = 0.2) -> tuple[subprocess.Popen, list[int]]:
    """A keeper of a stubborn command; returns it and the processes that it must not leave."""
    command = [sys.executable, "-I", keeper.__file__, str(grace_s), sys.executable, "-c", STUBBORN.format(then=then)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, [int(process.stdout.readline()) for _ in range(2)]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


@pytest.fixture
def keep() -> Iterator[Callable[..., tuple[subprocess.Popen, list[int]]]]:
    started = []

    def begin(*args: object) -> tuple[subprocess.Popen, list[int]]:
        started.append(start(*args))
        return started[-1]

    yield begin
    for process, _ in started:
        process.kill()
        process.wait()


def close_stdin(process: subprocess.Popen) -> None:
    """What the kernel does when the keeper's parent ends."""
    assert process.stdin is not None
    process.stdin.close()


@pytest.mark.parametrize("end", [subprocess.Popen.terminate, close_stdin], ids=["SIGTERM", "end of its parent"])
def test_nothing_is_left_when_the_keeper_is_told_to_end_or_loses_its_parent(keep, end):
    process, pids = keep("time.sleep(600)")
    assert all(map(is_alive, pids))
    end(process)
    assert process.wait(LIMIT_S) == 128 + signal.SIGKILL
    assert not any(map(is_alive, pids))  # at once: the keeper returns only then


def test_nothing_is_left_of_a_stopped_command(keep):
    process, pids = keep("os.kill(os.getpid(), signal.SIGSTOP)")
    process.terminate()
    process.wait(LIMIT_S)
    assert not any(map(is_alive, pids))


def test_the_commands_own_end_ends_what_it_left_and_gives_its_exit_code(keep):
    process, pids = keep("sys.exit(7)")
    assert process.wait(LIMIT_S) == 7
    assert not any(map(is_alive, pids))
    process, _ = keep("os.kill(os.getpid(), signal.SIGUSR1)")
    assert process.wait(LIMIT_S) == 128 + signal.SIGUSR1


def test_a_killed_keeper_takes_the_command_with_it(keep):
    process, pids = keep("time.sleep(600)")
    command = pids[1]
    process.kill()
    process.wait(LIMIT_S)
    deadline = time.monotonic() + LIMIT_S
    while is_alive(command) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_alive(command)
    subprocess.run(["kill", "-9", str(pids[0])], check=False)  # the one that had left: nobody else knows it


def test_a_command_that_ends_on_sigterm_is_given_the_time(keep):
    handler = "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), os._exit(5)))"
    process, _ = keep(f"{handler}; print('armed', flush=True); signal.pause()", LIMIT_S)
    assert process.stdout.readline() == "armed\n"
    process.terminate()
    assert process.wait(LIMIT_S) == 5
