"""Programs in jails: what they may do, what they may not, and that nothing is left of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from asyppo_megatron.config import RewardConfig
from asyppo_megatron.rewards import CodeReward, Sample, Verdict
from asyppo_megatron.rewards.code import extract_program, row_error

RIGHT, WRONG = Verdict(1.0), Verdict(0.0)
ECHO = [{"stdin": "ok\n", "stdout": "ok"}]


def fenced(program: str) -> str:
    return f"Here it is:\n```python\n{program}\n```\nDone."


def code_config(**sandbox) -> RewardConfig:
    return RewardConfig.model_validate(
        {
            "kind": "code",
            "workers": 2,
            "timeout_s": 40.0,
            "memory_gb": 0.25,
            "sandbox": {"test_timeout_s": 4.0, "processes": 8, "file_mb": 4, "output_kb": 64, **sandbox},
        }
    )


@pytest.fixture(scope="module")
def reward():
    try:
        reward = CodeReward(code_config())
    except ValueError as e:
        pytest.skip(str(e))
    yield reward
    reward.close()


def judge(reward: CodeReward, program: str, tests=ECHO) -> Verdict:
    (verdict,) = reward.score_many([Sample(fenced(program), "", extra={"tests": tests})])
    return verdict


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python\nprint(1)\n```", "print(1)\n"),
        ("```\nprint(1)\n```", "print(1)\n"),
        ("```python\r\nprint('\u2028\x0c')\r\n```\r\n", "print('\u2028\x0c')\n"),
        ("```py\nprint(1)\n```\nor\n```python\nprint(2)\n```", "print(2)\n"),
        ("```cpp\nint x;\n```", None),
        ("```python\nprint(1)\n```\n```text\noutput\n```", "print(1)\n"),
        ("```python\nprint(1)\n```\n```python\ncut off", "print(1)\n"),
        ("```python\nprint(1)", None),
        ("```python\n\n```", None),
        ("print(1)", None),
        ("", None),
        ("```python\n" + "x = 1\n" * 100_000 + "```", None),
    ],
)
def test_the_last_complete_block_of_python_is_the_program(text, program):
    assert extract_program(text) == program


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"tests": [{"stdin": "", "stdout": "1"}, {"assert": "assert f(1)"}]}, ""),
        ({}, "tests: missing, need a list"),
        ({"tests": []}, r"tests: got \[\], need a list"),
        ({"tests": [{"stdin": ""}]}, "tests: item 0 is"),
        ({"tests": [{"assert": 1}]}, "tests: item 0 is"),
        ({"tests": ["assert f(1)"]}, "tests: item 0 is"),
    ],
)
def test_rows_are_checked_for_their_tests(extra, message):
    import re

    assert re.match(message, row_error(extra)) and bool(message) == bool(row_error(extra))


def test_programs_are_judged_by_their_output(reward):
    doubled = [{"stdin": f"{i}\n", "stdout": f"{2 * i}\n"} for i in range(5)]
    assert judge(reward, "print(2 * int(input()))", doubled) == RIGHT
    assert judge(reward, "print(2 * int(input()), '  \\n')", doubled) == RIGHT, "white space at the end does not count"
    assert judge(reward, "print(8)", doubled) == WRONG
    assert judge(reward, "print('0')\nraise SystemExit(3)", doubled) == Verdict(0.0, "code_error")
    assert reward.score_many([Sample("no program", "", extra={"tests": ECHO})]) == [Verdict(0.0, "code_missing")]
    big = [{"stdin": "7 " * 200_000, "stdout": "1400000"}]
    assert judge(reward, "print(sum(map(int, input().split())))", big) == RIGHT, "more than a pipe holds"


def test_programs_are_judged_by_statements(reward):
    tests = [{"assert": "assert f(1) == 2"}, {"assert": "for i in range(9):\n    assert f(i) == i + 1"}]
    assert judge(reward, "def f(x):\n    return x + 1", tests) == RIGHT
    assert judge(reward, "def f(x):\n    return 2", tests) == WRONG
    assert judge(reward, "def g(x):\n    return 2", tests) == Verdict(0.0, "code_error")


@pytest.mark.parametrize(
    "program",
    ["import sys; sys.exit(0)", "import os; os._exit(0)", "class f:\n    def __eq__(s, o): import os; os._exit(0)"],
)
def test_a_program_that_ends_before_its_tests_has_not_passed_them(reward, program):
    assert judge(reward, program, [{"assert": "assert f() == 1"}]) == WRONG


def test_a_share_of_the_tests_can_be_the_score():
    reward = CodeReward(code_config(score="fraction"))
    tests = [{"stdin": str(i), "stdout": str(abs(i))} for i in (-2, -1, 0, 1)]
    try:
        assert judge(reward, "print(input())", tests) == Verdict(0.5)
    finally:
        reward.close()


HOSTILE = {
    "an endless loop": ("while True: pass", "code_timeout"),
    "a sleep": ("import time; time.sleep(1000)", "code_timeout"),
    "a program that ignores signals": (
        "import signal, time\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: time.sleep(1)",
        "code_timeout",
    ),
    "an endless output": ("while True: print('x' * 1000)", "code_output"),
    "an endless complaint": ("import sys\nwhile True: sys.stderr.write('x' * 1000)", "code_output"),
    "a fork bomb": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", "code_processes"),
    "threads without end": (
        "import threading, time\nwhile True:\n    try: threading.Thread(target=time.sleep, args=(99,)).start()\n"
        "    except RuntimeError: time.sleep(0.01)",
        ("code_processes", "code_timeout"),  # their stacks may fill the address space first
    ),
    "huge memory": ("x = bytearray(1 << 40)", "code_memory"),
    "memory that grows": ("x = []\nwhile True: x.append(bytearray(16 << 20))", "code_memory"),
    "memory of many processes": (
        "import os, time\nfor i in range(5):\n    if not os.fork():\n        x = b'x' * (100 << 20)\n"
        "        time.sleep(60)\ntime.sleep(60)",
        "code_memory",
    ),
    "a network call": ("import socket\nsocket.create_connection(('1.1.1.1', 80))", "code_forbidden"),
    "a server": ("import socket\nsocket.socket().bind(('', 8080))", "code_forbidden"),
    "tracing": ("import ctypes\nctypes.CDLL(None).ptrace(16, 1, 0, 0)", "code_forbidden"),
    "a namespace of its own": ("import ctypes\nctypes.CDLL(None).unshare(0x10000000)", "code_forbidden"),
    "a mount": ("import ctypes\nctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, 0)", "code_forbidden"),
    "a crash": ("import ctypes\nctypes.string_at(0)", "code_crash"),
    "deep nesting": ("x = " + "(" * 50_000, "code_error"),
    "recursion": ("def f(): f()\nf()", "code_error"),
    "a tower of powers": ("print(9 ** 9 ** 9 ** 9)", ("code_timeout", "code_memory")),
    "a disk that fills": (
        "n = 0\nwhile True:\n    open(f'/tmp/{n}', 'wb').write(b'x' * (1 << 20)); n += 1",
        "code_error",
    ),
    "bytes that are no text": ("import sys; sys.stdout.buffer.write(b'\\xff\\x00' * 100)", "ok"),
}


def test_hostile_programs_score_zero_by_cause_and_the_next_is_still_right(reward):
    samples = [Sample(fenced(program), "", extra={"tests": ECHO}) for program, _ in HOSTILE.values()]
    good = Sample(fenced("print(input())"), "", extra={"tests": ECHO})
    start = time.monotonic()
    verdicts = reward.score_many([*samples, good])
    assert time.monotonic() - start < 120
    assert verdicts.pop() == RIGHT
    found = {name: (v.reward, v.status) for name, v in zip(HOSTILE, verdicts, strict=True)}
    for name, (_, cause) in HOSTILE.items():
        assert found[name][0] == 0.0 and found[name][1] in ((cause,) if isinstance(cause, str) else cause), (
            name,
            found,
        )


def test_nothing_outside_is_seen_or_changed(reward, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("swordfish")
    tmp_path.chmod(0o777)
    secret.chmod(0o666)
    os.environ["ASYPPO_TEST_SECRET"] = "swordfish"
    lines = [
        "import os, sys, glob",
        "found = []",
        f"for path in ({str(secret)!r}, '/etc/passwd', '/proc/1/environ', '/proc/self/environ', '/sys/kernel'):",
        "    try: found.append(open(path).read()[:20])",
        "    except OSError: pass",
        f"for folder in ({str(tmp_path)!r}, '/', '/usr/lib', '/dev', '/dev/shm', '/var/tmp', '/root', sys.prefix):",
        "    try: open(folder + '/written', 'w').write('x'); found.append(folder)",
        "    except OSError: pass",
        "if any('SECRET' in k or v == 'swordfish' for k, v in os.environ.items()): found.append('environment')",
        "if os.listdir('/tmp'): found.append('not empty')",
        "if os.getuid() == 0 or len(os.listdir('/')) > 12: found.append(str(os.listdir('/')))",
        "for pid in range(1, 4):",
        "    try: os.kill(pid, 0); found.append(f'pid {pid}') if pid not in (1, os.getpid()) else None",
        "    except OSError: pass",
        "try: os.setuid(0); found.append('root')",
        "except OSError: pass",
        "print(found)",
    ]
    try:
        assert judge(reward, "\n".join(lines), [{"stdin": "", "stdout": "[]"}]) == RIGHT
    finally:
        del os.environ["ASYPPO_TEST_SECRET"]
    assert [p.name for p in tmp_path.iterdir()] == ["secret"] and secret.read_text() == "swordfish"


def test_a_test_sees_nothing_of_the_one_before(reward):
    program = (
        "import os\nprint(os.listdir('/tmp'), os.getpid() < 50, flush=True)\nopen('/tmp/left', 'w').write('x')\n"
        "if not os.fork():\n    import time; os.setsid(); time.sleep(50)"
    )
    assert judge(reward, program, [{"stdin": "", "stdout": "[] True"}] * 3) == RIGHT


def test_signals_reach_neither_the_supervisor_nor_the_parent(reward):
    before = [w.process.pid for w in reward._pool.workers]
    program = (
        "import os, signal\n"
        "for pid in [os.getppid(), 1, -1, 0, *range(2, 2000)]:\n"
        "    for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM):\n"
        "        if pid != 0 and pid != os.getpid():\n"
        "            try: os.kill(pid, number)\n"
        "            except OSError: pass\n"
        "print('survived')"
    )
    assert judge(reward, program, [{"stdin": "", "stdout": "survived"}]).status in ("ok", "code_timeout")
    assert [w.process.pid for w in reward._pool.workers] == before, "no supervisor was lost"
    assert judge(reward, "print(input())") == RIGHT


def test_no_process_and_no_file_is_left(reward):
    own = psutil.Process()
    before = {p.pid for p in own.children(recursive=True)}
    files = set(os.listdir("/tmp"))
    bomb = "import os\nfor i in range(6):\n    if not os.fork():\n        os.setsid()\n        while True: pass\n"
    bomb += "while True: pass"
    assert judge(reward, bomb).status == "code_timeout"
    assert {p.pid for p in own.children(recursive=True)} <= before
    marks = [p.pid for p in psutil.process_iter(["uids"]) if p.info["uids"] and 64000 <= p.info["uids"].real < 64002]
    assert not marks
    assert not {f for f in set(os.listdir("/tmp")) - files if f.startswith("asyppo-program")}


def test_a_supervisor_that_is_killed_takes_its_jail_along(reward):
    import threading

    result = []
    job = Sample(fenced("import time\nwhile True: time.sleep(1)"), "", extra={"tests": ECHO})
    thread = threading.Thread(target=lambda: result.append(reward.score_many([job])))
    thread.start()
    deadline = time.monotonic() + 20
    while not (busy := [w.process for w in reward._pool.workers if w.job is not None]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    parent = psutil.Process(busy[0].pid)
    while len(below := parent.children(recursive=True)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    parent.kill()
    thread.join(60)
    assert result == [[Verdict(0.0, "verifier_error")]]
    _, left = psutil.wait_procs(below, timeout=10)
    assert not left, left


def test_the_protection_is_named(reward):
    assert "read-only root directory" in reward.protection and "filtered system calls" in reward.protection
    assert ("user id of its own" in reward.protection) == (os.geteuid() == 0)


def readable_python() -> str | None:
    """An interpreter that another user may run: those of this test may lie in a private home."""
    return next((p for p in ("/usr/bin/python3", "/usr/local/bin/python3") if os.path.exists(p)), None)


UNPRIVILEGED = """
import sys
sys.path.append(sys.argv[1])
from sandbox import jail
from sandbox.supervisor import PROBE, Supervisor
jail.MODES = tuple(sys.argv[2].split(","))
supervisor = Supervisor(64000, sys.executable)
failures = supervisor.choose_mode(True)
print(supervisor.mode)
programs = sys.argv[3:]
for program in programs:
    limits = PROBE["limits"] | {"test_s": 2.0, "memory": 1 << 28}
    print(supervisor.run(PROBE | {"program": program, "limits": limits})["cause"] or "passed")
supervisor.close()
"""


def run_unprivileged(tmp_path: Path, modes: str, *programs: str) -> list[str]:
    """Causes of programs under a user without privileges; in a copy, since this folder may be private."""
    python = readable_python()
    if os.geteuid() != 0 or python is None:
        pytest.skip("needs root to become another user, and an interpreter that everyone may run")
    source = Path(__file__).resolve().parents[2] / "asyppo_megatron" / "rewards" / "sandbox"
    target = Path("/var/tmp") / f"asyppo-sandbox-test-{os.getpid()}"
    shutil.copytree(source, target / "sandbox", ignore=shutil.ignore_patterns("__pycache__"))
    for path in [target, *target.rglob("*")]:
        path.chmod(0o755)
    try:
        done = subprocess.run(
            [python, "-S", "-c", UNPRIVILEGED, str(target), modes, *programs],
            user=65534,
            group=65534,
            extra_groups=[],
            env={},
            cwd="/",
            capture_output=True,
            text=True,
            timeout=120,
        )
    finally:
        shutil.rmtree(target)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1]


ATTACKS = (
    "print(input())",
    "while True: pass",
    "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "import socket; socket.socket()",
    "x = bytearray(1 << 40)",
)


def test_an_unprivileged_account_uses_a_user_namespace(tmp_path):
    outside = (
        "import os\nseen = [p for p in ('/etc/passwd', '/proc/1', '/home', '/var') if os.path.exists(p)]\n"
        "try: open('/usr/lib/x', 'w'); seen.append('wrote')\nexcept OSError: pass\n"
        "try: os.kill(1, 9)\nexcept OSError: pass\nprint(seen or input())"
    )
    mode, *causes = run_unprivileged(tmp_path, "root,user,limits", *ATTACKS, outside)
    if mode == "limits":
        pytest.skip("this machine has no unprivileged user namespaces")
    assert mode == "user"
    assert causes == ["passed", "timeout", "processes", "forbidden", "memory", "passed"]


def test_without_any_isolation_limits_remain_and_all_processes_die(tmp_path):
    orphan = "import os, time\nif not os.fork():\n    os.setsid()\n    time.sleep(77777)\nprint(input())"
    mode, *causes = run_unprivileged(tmp_path, "limits", *ATTACKS, orphan)
    assert mode == "limits"
    assert causes[:2] == ["passed", "timeout"] and causes[3:] == ["forbidden", "memory", "passed"]
    assert causes[2] in ("timeout", "error", "processes")
    assert not [p for p in psutil.process_iter(["uids"]) if p.info["uids"] and p.info["uids"].real == 65534]


def test_a_machine_without_isolation_is_refused_unless_allowed(monkeypatch):
    from asyppo_megatron.rewards import code

    broken = "import sys; sys.path.append(sys.argv.pop(1)); from sandbox import jail, supervisor\n"
    broken += "def refuse(*a): raise PermissionError('no namespaces here')\n"
    broken += "real = jail.enter_namespaces\n"
    broken += "jail.enter_namespaces = lambda mode, *a: real(mode, *a) if mode == 'limits' else refuse()\n"
    broken += "supervisor.main()"
    monkeypatch.setattr(code, "START", broken)
    with pytest.raises(ValueError, match="got code, need a machine that can isolate programs .*no namespaces here"):
        CodeReward(code_config())
    python = readable_python()
    if python is None:
        pytest.skip("no interpreter that everyone may run")
    reward = CodeReward(code_config(allow_unprotected=True, python=python))
    try:
        assert "NOT ISOLATED" in reward.protection
        assert judge(reward, "print(input())") == RIGHT
    finally:
        reward.close()


def test_another_interpreter_may_bring_its_packages(reward):
    other = CodeReward(code_config(python=sys.executable if readable_python() is None else readable_python()))
    try:
        assert judge(other, "import json; print(json.loads(json.dumps(input())))") == RIGHT
    finally:
        other.close()
