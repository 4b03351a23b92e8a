"""The set-up chooses the right lane, knows a finished environment from a broken one, and repairs the latter."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "setup_env.py"


@pytest.fixture
def setup_env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, with its checkout in a temporary folder."""
    spec = importlib.util.spec_from_file_location("setup_env", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "setup_env", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    (tmp_path / "requirements").mkdir()
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    for name in ("production", "light", "sglang_cpu"):
        (tmp_path / "requirements" / f"{name}.txt").write_text("torch\n")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "ENVS", tmp_path / ".venv")
    return module


ROOM = {"production": 0.0, "light": 0.0}


def pythons(setup_env: ModuleType, *versions: str) -> list:
    return [setup_env.Python(f"/py/{v}", tuple(map(int, v.split(".")))) for v in versions]


@pytest.mark.parametrize(
    ("versions", "lane", "version"),
    [
        (["3.11.7", "3.13.0", "3.12.1"], "production", (3, 12, 1)),
        (["3.11.7", "3.14.0", "3.13.0"], "production", (3, 13, 0)),
        (["3.11.7", "3.10.13"], "light", (3, 11, 7)),
        (["3.12.4", "3.12.1"], "production", (3, 12, 4)),
    ],
)
def test_best_is_the_production_lane_on_its_preferred_python(setup_env, versions, lane, version):
    choice = setup_env.choose_lane("best", pythons(setup_env, *versions), set(), ROOM)
    assert (choice.lane.name, choice.python.version) == (lane, version)


def test_best_falls_back_to_the_light_lane_when_the_disk_is_short_and_says_so(setup_env):
    choice = setup_env.choose_lane(
        "best", pythons(setup_env, "3.12.1", "3.11.7"), set(), {"production": 4.0, "light": 0.0}
    )
    assert choice.lane.name == "light"
    assert "4.0 GB are missing" in choice.reason


def test_no_suitable_python_is_an_error_that_says_what_was_found_and_what_to_do(setup_env):
    with pytest.raises(setup_env.NoLaneError) as error:
        setup_env.choose_lane("best", pythons(setup_env, "3.10.13"), set(), ROOM)
    for part in ("needs Python 3.12 or newer", "needs Python 3.11", "3.10.13", "Install Python 3.12"):
        assert part in str(error.value)


def test_a_named_lane_is_not_replaced_by_another(setup_env):
    with pytest.raises(setup_env.NoLaneError, match="production lane: needs Python 3.12 or newer"):
        setup_env.choose_lane("production", pythons(setup_env, "3.11.7"), set(), ROOM)


@pytest.mark.parametrize(
    ("versions", "other"), [(["3.12.1", "3.11.7"], "light"), (["3.12.1"], None), (["3.11.7"], None)]
)
def test_the_other_lane_is_the_one_that_best_is_not(setup_env, versions, other):
    found = pythons(setup_env, *versions)
    if other is None:
        with pytest.raises(setup_env.NoLaneError):
            setup_env.choose_lane("other", found, set(), ROOM)
    else:
        assert setup_env.choose_lane("other", found, set(), ROOM).lane.name == other


def test_a_finished_lane_needs_neither_its_python_nor_disk(setup_env):
    choice = setup_env.choose_lane("best", [], {"production"}, {"production": 0.0, "light": 9.0})
    assert (choice.lane.name, choice.python) == ("production", None)


def test_other_without_its_python_exits_zero_and_prints_nothing(setup_env, monkeypatch, capsys):
    monkeypatch.setattr(setup_env, "find_pythons", lambda: pythons(setup_env, "3.10.13"))
    monkeypatch.setattr(sys, "argv", ["setup_env.py", "--lane", "other", "--print-python"])
    assert setup_env.main() == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "needs Python" in captured.err
    monkeypatch.setattr(sys, "argv", ["setup_env.py"])
    assert setup_env.main() == 1


def test_pyenv_versions_are_found_without_their_shims(setup_env, tmp_path):
    shim = tmp_path / "shims" / "python3.12"
    real = tmp_path / "pyenv" / "versions" / "3.12.1" / "bin" / "python"
    for path, script in ((shim, "#!/bin/sh\nexit 127\n"), (real, f'#!/bin/sh\nexec {sys.executable} "$@"\n')):
        path.parent.mkdir(parents=True)
        path.write_text(script)
        path.chmod(0o755)
    found = setup_env.candidates({"PATH": str(shim.parent), "PYENV_ROOT": str(tmp_path / "pyenv")}, None)
    assert found[0] == str(shim)
    assert str(real) in found
    assert setup_env.probe(str(shim)) is None
    assert setup_env.probe(str(real)).version == sys.version_info[:3]


def test_the_stamp_is_void_when_anything_it_was_made_from_changes(setup_env, tmp_path):
    lane = setup_env.LIGHT
    key = setup_env.wanted_key(lane)
    assert key == setup_env.wanted_key(lane)
    assert key != setup_env.wanted_key(setup_env.PRODUCTION)
    (tmp_path / "requirements" / "light.txt").write_text("torch==2\n")
    changed = setup_env.wanted_key(lane)
    assert changed != key
    (tmp_path / "pyproject.toml").write_text("[project]\nname='x'\n")
    assert setup_env.wanted_key(lane) not in (key, changed)


def test_sglangs_list_voids_the_stamp_of_its_lane_alone(setup_env, tmp_path):
    keys = [setup_env.wanted_key(lane) for lane in (setup_env.PRODUCTION, setup_env.LIGHT)]
    (tmp_path / "requirements" / "sglang_cpu.txt").write_text("sglang==2\n")
    after = [setup_env.wanted_key(lane) for lane in (setup_env.PRODUCTION, setup_env.LIGHT)]
    assert after[0] != keys[0]
    assert after[1] == keys[1]
    (tmp_path / "requirements" / "sglang_cpu.txt").unlink()
    with pytest.raises(setup_env.SetupError, match="sglang_cpu.txt: not found"):
        setup_env.wanted_key(setup_env.PRODUCTION)


def fake_environment(setup_env: ModuleType, lane: object, script: str) -> Path:
    """An environment whose Python writes down what it is asked for and answers by `script`; returns the record."""
    record = setup_env.ENVS / "record"
    lane.python.parent.mkdir(parents=True)
    lane.python.write_text(f'#!/bin/sh\necho "$@" >> "{record}"\n{script}\n')
    lane.python.chmod(0o755)
    return record


def add_sglang(setup_env: ModuleType, lane: object) -> str:
    with open(setup_env.ENVS / "lock", "w") as lock:
        return setup_env.install_sglang(lane, setup_env.ENVS / "log", dict(setup_env.os.environ), lock.fileno())


@pytest.mark.parametrize(
    ("fails", "reason"),
    [("*sglang_cpu.txt*", "installing SGLang failed (exit status 3)"), ("*import*", "importing SGLang failed")],
)
def test_set_up_goes_on_without_an_sglang_that_fails_and_says_why(setup_env, capsys, fails, reason):
    lane = setup_env.PRODUCTION
    record = fake_environment(setup_env, lane, f'case "$*" in {fails}) echo no such index; exit 3;; esac')
    missing = add_sglang(setup_env, lane)
    assert missing.startswith(reason)
    assert str(setup_env.ENVS / "log") in missing
    assert "\n" not in missing
    said = capsys.readouterr().err
    assert "no such index" in said
    assert "Going on without SGLang" in said
    assert record.read_text().splitlines()[-1] == "-m pip uninstall -y sglang"  # what is found must be usable


def test_an_sglang_that_installs_and_imports_is_not_missing(setup_env):
    record = fake_environment(setup_env, setup_env.PRODUCTION, "exit 0")
    assert add_sglang(setup_env, setup_env.PRODUCTION) == ""
    assert "--no-deps" in record.read_text()
    assert "uninstall" not in record.read_text()


def test_the_light_lane_has_no_sglang(setup_env):
    setup_env.ENVS.mkdir()
    assert add_sglang(setup_env, setup_env.LIGHT) == "the light lane has none"


def test_a_missing_sglang_is_tried_again_by_a_plain_set_up_only(setup_env, monkeypatch):
    lane, installed = setup_env.PRODUCTION, []
    lane.python.parent.mkdir(parents=True)
    lane.python.symlink_to(sys.executable)
    monkeypatch.setattr(setup_env, "install", lambda lane, python, lock_fd: installed.append(lane.name))
    monkeypatch.setattr(setup_env, "find_pythons", list)  # the interpreter it was made with may be gone
    setup_env.write_stamp(lane.env, setup_env.wanted_key(lane), sglang_missing="no index")
    assert setup_env.sglang_obstacle(lane.env) == "no index"
    assert setup_env.ensure("best") is lane
    assert installed == []
    assert setup_env.ensure("best", retry=True) is lane
    assert installed == ["production"]
    setup_env.write_stamp(lane.env, setup_env.wanted_key(lane), sglang_missing="")
    setup_env.ensure("best", retry=True)
    assert installed == ["production"]


def test_every_line_of_sglangs_list_is_pinned_and_agrees_with_the_lane():
    def pins(name: str) -> dict[str, str]:
        lines = (SCRIPT.parents[1] / "requirements" / name).read_text().splitlines()
        words = [line.split("#")[0].strip() for line in lines]
        pairs = [word.partition("==") for word in words if word]
        assert all(version for _, _, version in pairs), f"{name}: a line without =="
        return {package.lower().replace("_", "-"): version for package, _, version in pairs}

    lane, sglang = pins("production.txt"), pins("sglang_cpu.txt")
    assert {name: version for name, version in sglang.items() if lane.get(name, version) != version} == {}
    assert sglang["sglang"] == lane["sglang"]


def test_a_lane_is_ready_only_with_a_matching_stamp_and_a_python_that_runs(setup_env):
    lane = setup_env.LIGHT
    assert not setup_env.is_ready(lane)
    lane.python.parent.mkdir(parents=True)
    lane.python.symlink_to(sys.executable)
    assert not setup_env.is_ready(lane)
    setup_env.write_stamp(lane.env, setup_env.wanted_key(lane), lane="light")
    assert setup_env.is_ready(lane)
    setup_env.write_stamp(lane.env, "an older key")
    assert not setup_env.is_ready(lane)
    setup_env.write_stamp(lane.env, setup_env.wanted_key(lane))
    lane.python.unlink()
    assert not setup_env.is_ready(lane)
    setup_env.stamp_path(lane.env).write_text("{")
    assert setup_env.read_stamp(lane.env) is None


def make_distribution(site_packages: Path, name: str) -> Path:
    info = site_packages / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (site_packages / f"{name}.py").write_text("x = 1\n")
    (info / "RECORD").write_text(f'{name}.py,sha256=x,6\n{info.name}/RECORD,,\n"__pycache__/{name}.pyc",,\n')
    return info


def test_what_a_killed_pip_leaves_behind_is_found(setup_env, tmp_path):
    whole, cut, gone, unrecorded = (make_distribution(tmp_path, n) for n in ("whole", "cut", "gone", "unrecorded"))
    assert setup_env.broken_distributions(tmp_path) == []
    (tmp_path / "cut.py").write_text("x")
    (tmp_path / "gone.py").unlink()
    (unrecorded / "RECORD").unlink()
    assert set(setup_env.broken_distributions(tmp_path)) == {cut, gone, unrecorded}
    assert whole.is_dir()


def test_a_child_keeps_the_lock_when_its_set_up_is_killed(setup_env):
    code = (
        "import fcntl, sys\n"
        "try:\n    fcntl.flock(open(sys.argv[1], 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB); print('free')\n"
        "except OSError:\n    print('taken')\n"
    )

    def state() -> str:
        command = [sys.executable, "-c", code, str(setup_env.ENVS / "setup.lock")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    with setup_env.locked() as lock_fd:
        child = subprocess.Popen(["sleep", "60"], pass_fds=(lock_fd,))
    try:
        assert state() == "taken"
    finally:
        child.kill()
        child.wait()
    assert state() == "free"


def test_pip_sees_the_callers_index_but_no_foreign_packages(setup_env, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_INDEX_URL", "file:///somewhere")
    monkeypatch.setenv("PYTHONPATH", "/foreign")
    environ = setup_env.pip_environment(tmp_path)
    assert environ["PIP_INDEX_URL"] == "file:///somewhere"
    assert "PYTHONPATH" not in environ
    assert environ["TMPDIR"].startswith(str(tmp_path))
