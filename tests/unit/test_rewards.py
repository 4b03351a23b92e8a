"""Verifiers: right verdicts, and survival of whatever a model writes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from asyppo_megatron.config import RewardConfig
from asyppo_megatron.rewards import ExactMatch, MathVerifier, Verdict, build_verifier

RIGHT, WRONG = Verdict(1.0), Verdict(0.0)
TIMEOUT, ERROR = Verdict(0.0, "verifier_timeout"), Verdict(0.0, "verifier_error")


@pytest.fixture(scope="module")
def verifier():
    verifier = MathVerifier(workers=2, timeout_s=2.0, memory_gb=1.0)
    yield verifier
    verifier.close()


def warm_up(verifier):
    """Until every worker is up."""
    while not all(worker.ready for worker in verifier._pool.workers):
        verifier.score_many([(r"\boxed{5}", "5")] * 8)


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("7+5=2;2*3=6;#6$", 1.0),
        ("#6", 1.0),
        ("# 6 $", 1.0),
        ("#5$", 0.0),
        ("#5;#6$", 1.0),
        ("#6;#5$", 0.0),
        ("#6$7", 0.0),
        ("6", 0.0),
        ("", 0.0),
    ],
)
def test_exact_match_compares_the_last_marked_answer(text, reward):
    assert ExactMatch(RewardConfig(kind="exact").answer_pattern, 1.0).score_many([(text, " 6 ")]) == [Verdict(reward)]


def test_exact_match_reads_only_the_end_of_a_response():
    assert ExactMatch("#(.)", 1.0).score_many([("#6" + "x" * 2000, "6"), ("x" * 5000 + "#6", "6")]) == [WRONG, RIGHT]


def test_exact_match_gives_up_where_a_text_makes_the_pattern_explode():
    explosive = ExactMatch(r"(a+)+$", 0.2)
    started = time.monotonic()
    assert explosive.score_many([("a" * 1000 + "b", "a"), ("a", "a")]) == [TIMEOUT, RIGHT]
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(("pattern", "message"), [("(", "is no regular expression"), ("#6", "need a group")])
def test_exact_match_refuses_a_pattern_it_cannot_use(pattern, message):
    with pytest.raises(ValueError, match=message):
        build_verifier(RewardConfig(kind="exact", answer_pattern=pattern))


def test_math_verdicts_come_in_order(verifier):
    pairs = [(f"so the answer is \\boxed{{{i}}}", str(i + i % 3 // 2)) for i in range(60)]
    assert verifier.score_many(pairs) == [WRONG if i % 3 == 2 else RIGHT for i in range(60)]
    assert verifier.score_many([]) == []


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        (r"\boxed{\frac{1}{2}}", "0.5", RIGHT),
        (r"\boxed{\frac{1}{2}}", r"\frac12", RIGHT),
        (r"\boxed{2x+1}", "$1+2x$", RIGHT),
        (r"the answer is $\boxed{3}$, no: the answer is $\boxed{4}$", "4", RIGHT),
        ("no answer", "4", WRONG),
        ("", "4", WRONG),
    ],
)
def test_math_compares_meaning(verifier, text, answer, expected):
    assert verifier.score_many([(text, answer)]) == [expected]


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{9^{9^{9^9}}}",
        "\\boxed{" + "(" * 3000,
        r"\boxed{10000000000!}",
        "\ud800\x00 \\boxed{",
        r"\boxed{" * 300,
        r"\boxed{\frac{1}{0}}",
    ],
)
def test_hostile_responses_score_zero_and_the_next_is_still_right(verifier, text):
    start = time.monotonic()
    bad, good = verifier.score_many([(text, "5"), (r"\boxed{5}", "5")])
    assert bad.reward == 0.0 and good == RIGHT
    assert time.monotonic() - start < 60


def test_a_worker_that_hangs_is_killed_at_the_deadline_and_replaced(verifier):
    warm_up(verifier)
    pids = [w.process.pid for w in verifier._pool.workers]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    start = time.monotonic()
    assert verifier.score_many([(r"\boxed{5}", "5")] * 3) == [TIMEOUT, TIMEOUT, RIGHT]
    assert time.monotonic() - start < 100  # not for ever; workers import for seconds on a busy machine
    assert not set(pids) & {w.process.pid for w in verifier._pool.workers}


def test_a_worker_that_died_between_calls_costs_no_response(verifier):
    for worker in verifier._pool.workers:
        worker.process.kill()
        worker.process.wait()
    assert verifier.score_many([(r"\boxed{5}", "5")] * 4) == [RIGHT] * 4


def test_a_worker_that_crashes_on_a_response_is_counted(verifier):
    warm_up(verifier)
    for worker in verifier._pool.workers:
        os.kill(worker.process.pid, signal.SIGSTOP)

    def kill_when_busy(worker):
        while worker.job is None:
            time.sleep(0.01)
        os.kill(worker.process.pid, signal.SIGKILL)

    for worker in verifier._pool.workers:
        threading.Thread(target=kill_when_busy, args=(worker,), daemon=True).start()
    assert verifier.score_many([(r"\boxed{5}", "5")] * 2) == [ERROR, ERROR]
    assert verifier.score_many([(r"\boxed{5}", "5")]) == [RIGHT]


def test_an_unusable_reference_answer_is_an_error_not_a_wrong_response(verifier):
    assert verifier.score_many([(r"\boxed{5}", " ")]) == [ERROR]


def test_workers_import_neither_torch_nor_this_package(verifier):
    warm_up(verifier)
    for worker in verifier._pool.workers:
        maps = Path(f"/proc/{worker.process.pid}/maps").read_text()
        assert "libtorch" not in maps
        resident = next(
            line for line in Path(f"/proc/{worker.process.pid}/status").read_text().splitlines() if "VmRSS" in line
        )
        assert int(resident.split()[1]) < 150_000  # kB


def test_workers_die_with_their_parent():
    code = (
        "import os, signal\n"
        "from asyppo_megatron.rewards import MathVerifier\n"
        "v = MathVerifier(1, 5.0, 1.0)\n"
        "print(v._pool.workers[0].process.pid, v.score_many([('\\\\boxed{5}', '5')])[0].reward, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    pid, reward = done.stdout.split()
    assert done.returncode == -signal.SIGKILL and reward == "1.0"
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < deadline, "the worker outlived its parent"
        time.sleep(0.05)


def test_a_worker_that_cannot_start_is_an_error_with_its_cause():
    verifier = MathVerifier(workers=1, timeout_s=2.0, memory_gb=0.01)
    with pytest.raises(RuntimeError, match=r"3 workers in a row ended before they were ready .*raise reward.memory_gb"):
        verifier.score_many([(r"\boxed{5}", "5")])
    verifier.close()
