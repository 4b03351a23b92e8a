#!/usr/bin/env python3
"""Set up the environment that this project runs and tests in. Standard library only; any python3 >= 3.8 runs it.

Two lanes, each with versions that are tested together (requirements/<lane>.txt):

    production  Python >= 3.12: the versions a GPU machine runs, next to SGLang
    light       Python 3.11: the newest that Megatron-Core offers there

The production lane then gets SGLang's Python part (requirements/sglang_cpu.txt): enough for its server to run on a CPU,
at a tenth of the size of the whole. Where that fails, set-up goes on without it and says so, in the tests' summary too.

`best` (the default) is the production lane where its Python is found and the disk has room, else the light lane.
`other` is the lane that `best` is not; where it cannot be set up, this exits 0 and says why on stderr.

Safe to repeat: a stamp, written last, holds a hash of all that decides the environment; when it matches, nothing is
done. Safe to interrupt: a half-made environment is found and repaired. Two set-ups at once wait for each other.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import glob
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVS = ROOT / ".venv"
EXTRAS = "test,wandb"
SGLANG_IMPORTS = "sglang, torchvision, sglang.srt.server_args"
IMPORTS = "torch, megatron.core, transformers, math_verify, matplotlib, pydantic, pytest"


class SetupError(Exception):
    """Set-up cannot go on; the message says what was found, what is needed and what to do."""


class NoLaneError(SetupError):
    """The lane asked for cannot be had on this machine, as against one whose install failed."""


@dataclass(frozen=True)
class Lane:
    """One set of versions that are tested together.

    Attributes:
        minors: minor versions of Python 3 it runs on, the preferred one first.
        disk_gb: free space a fresh install needs, downloads included.
    """

    name: str
    minors: tuple
    disk_gb: float

    @property
    def env(self) -> Path:
        return ENVS / self.name

    @property
    def python(self) -> Path:
        return self.env / "bin" / "python"

    @property
    def requirements(self) -> Path:
        return ROOT / "requirements" / f"{self.name}.txt"

    @property
    def sglang_requirements(self) -> Path | None:
        """What SGLang adds to the lane, None where the lane has no SGLang."""
        return ROOT / "requirements" / "sglang_cpu.txt" if self.name == "production" else None


PRODUCTION = Lane("production", (12, 13, 14), 9.0)
LIGHT = Lane("light", (11,), 2.5)
LANES = (PRODUCTION, LIGHT)  # best first


@dataclass(frozen=True)
class Python:
    """An interpreter that was run and can make virtual environments."""

    path: str
    version: tuple

    def __str__(self) -> str:
        return f"Python {'.'.join(map(str, self.version))} ({self.path})"


@dataclass(frozen=True)
class Choice:
    """The lane to use, the interpreter to make it with (None: its environment is there) and why."""

    lane: Lane
    python: Python | None
    reason: str


def say(message: str) -> None:
    """To stderr: stdout is for `--print-python` alone."""
    print(f"set-up: {message}", file=sys.stderr, flush=True)


# --- which Python, which lane --------------------------------------------------------------------------------------


def candidates(environ: dict, pyenv_root: str | None) -> list:
    """Paths that may be a Python, those on PATH first; they exist but were not run."""
    names = [f"python3.{minor}" for lane in LANES for minor in lane.minors] + ["python3", "python"]
    folders = [folder for folder in environ.get("PATH", "").split(os.pathsep) if folder]
    paths = [os.path.join(folder, name) for name in names for folder in folders]
    for root in (pyenv_root, environ.get("PYENV_ROOT"), os.path.expanduser("~/.pyenv")):
        if root:
            paths += sorted(glob.glob(os.path.join(root, "versions", "3.1[1-9]*", "bin", "python")))
    return [path for path in dict.fromkeys(paths) if os.access(path, os.X_OK)]


def pyenv_root() -> str | None:
    """What `pyenv root` says, None without pyenv."""
    if shutil.which("pyenv") is None:
        return None
    done = subprocess.run(["pyenv", "root"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


PROBE = """
import ctypes, ensurepip, json, ssl, sys, sysconfig, venv
print(json.dumps({
    "path": getattr(sys, "_base_executable", None) or sys.executable,
    "version": list(sys.version_info[:3]),
    "usable": sys.implementation.name == "cpython" and sys.version_info.releaselevel in ("final", "candidate")
        and sys.maxsize > 2**32 and not sysconfig.get_config_var("Py_GIL_DISABLED"),
}))
"""


def probe(path: str) -> Python | None:
    """Run an interpreter (a pyenv shim exists for versions it then refuses); None when it cannot carry a lane."""
    try:
        done = subprocess.run([path, "-I", "-c", PROBE], capture_output=True, text=True, timeout=30, check=False)
        answer = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return Python(answer["path"], tuple(answer["version"])) if answer["usable"] else None


def find_pythons() -> list:
    """Every usable interpreter, once each."""
    found = {}
    for path in candidates(dict(os.environ), pyenv_root()):
        python = probe(path)
        if python is not None:
            found.setdefault(os.path.realpath(python.path), python)
    return list(found.values())


def choose_python(lane: Lane, pythons: list) -> Python | None:
    """The interpreter of the lane's most preferred version; of several, the one found first."""
    for minor in lane.minors:
        for python in pythons:
            if python.version[:2] == (3, minor):
                return python
    return None


def obstacle(lane: Lane, pythons: list, ready: set, missing_gb: dict) -> str | None:
    """Why the lane cannot be had, None when it can.

    Args:
        ready: names of lanes whose environment is complete.
        missing_gb: by lane name, GB of disk that its install still lacks, 0 when there is room.
    """
    if lane.name in ready:
        return None
    if choose_python(lane, pythons) is None:
        need = f"Python 3.{lane.minors[0]}" + (" or newer" if len(lane.minors) > 1 else "")
        found = ", ".join(str(python) for python in pythons) or "none"
        return f"{lane.name} lane: needs {need} (with venv, ssl and ctypes), found {found}"
    if missing_gb[lane.name] > 0:
        return (
            f"{lane.name} lane: its install needs {lane.disk_gb:g} GB on the disk of {ENVS}, "
            f"{missing_gb[lane.name]:.1f} GB are missing"
        )
    return None


def choose_lane(request: str, pythons: list, ready: set, missing_gb: dict) -> Choice:
    """The lane that `request` means.

    Raises:
        NoLaneError: the lane cannot be had; the message says why and what to do.
    """
    obstacles = {lane.name: obstacle(lane, pythons, ready, missing_gb) for lane in LANES}
    best = next((lane for lane in LANES if obstacles[lane.name] is None), None)
    if request == "best":
        if best is None:
            raise NoLaneError(
                "no lane can be set up:\n  " + "\n  ".join(str(text) for text in obstacles.values()) + "\n"
                "Install Python 3.12 (`pyenv install 3.12`, or your system's python3.12 and python3.12-venv) "
                "or free disk space, then run the same command again."
            )
        lane = best
        reason = "the best there is" if lane is LANES[0] else f"not the {obstacles[LANES[0].name]}"
    else:
        by_name = {lane.name: lane for lane in LANES}
        lane = by_name[request] if request in by_name else LANES[0 if best is not LANES[0] else 1]
        if obstacles[lane.name] is not None:
            raise NoLaneError(obstacles[lane.name])
        reason = "asked for" if request in by_name else "the other lane"
    return Choice(lane, choose_python(lane, pythons), reason)


# --- what is there already -----------------------------------------------------------------------------------------


def wanted_key(lane: Lane) -> str:
    """Hash of everything that decides the lane's environment, its place on disk included (paths are baked in)."""
    digest = hashlib.sha256(f"{lane.name}\0{ROOT}\0{EXTRAS}\0".encode())
    files = [ROOT / "pyproject.toml", lane.requirements, lane.sglang_requirements, Path(__file__).resolve()]
    for path in filter(None, files):
        if not path.is_file():
            raise SetupError(f"{path}: not found; run this from a complete checkout")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def stamp_path(env: Path) -> Path:
    return env / "setup-stamp.json"


def read_stamp(env: Path) -> str | None:
    """Key of the last complete set-up, None when there is none or it cannot be read."""
    try:
        return json.loads(stamp_path(env).read_text())["key"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def sglang_obstacle(env: Path) -> str | None:
    """Why a complete set-up has no SGLang, None when it has it (or there is no set-up)."""
    try:
        return json.loads(stamp_path(env).read_text())["sglang_missing"] or None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_stamp(env: Path, key: str, **facts: str) -> None:
    """Atomically: a stamp is whole or absent."""
    partial = stamp_path(env).with_suffix(".partial")
    partial.write_text(json.dumps({"key": key, **facts}, indent=1) + "\n")
    os.replace(partial, stamp_path(env))


def is_ready(lane: Lane) -> bool:
    """Complete, current, and its interpreter still runs (the Python it was made from may be gone)."""
    return read_stamp(lane.env) == wanted_key(lane) and env_version(lane) is not None


def env_version(lane: Lane) -> tuple | None:
    """Version of the environment's interpreter, None when it does not run."""
    try:
        command = [str(lane.python), "-I", "-c", "import sys; print(*sys.version_info[:3])"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return tuple(map(int, done.stdout.split()))


def disk_missing_gb(lane: Lane) -> float:
    """GB that the lane's install still lacks; what an interrupted one left behind counts as done."""
    place = ENVS
    while not place.exists():
        place = place.parent
    present = 0
    for folder, _, files in os.walk(lane.env):
        for name in files:
            with contextlib.suppress(OSError):  # vanishes under us when another set-up runs
                present += os.lstat(os.path.join(folder, name)).st_size
    return max(0.0, lane.disk_gb - (shutil.disk_usage(place).free + present) / 1e9)


def broken_distributions(site_packages: Path) -> list:
    """dist-info folders without RECORD, or whose RECORD names files that are missing or of another size.

    A killed pip leaves these behind and then takes them for installed.
    """
    broken = []
    for info in sorted(site_packages.glob("*.dist-info")):
        record = info / "RECORD"
        lines = record.read_text(encoding="utf-8").splitlines() if record.is_file() else [f"{record.name},,-1"]
        for line in lines:
            name, _, size = line.rsplit(",", 2)
            name = name.strip('"')
            if size == "":
                continue
            try:
                intact = os.stat(os.path.join(str(site_packages), name)).st_size == int(size)
            except OSError:
                intact = False
            if not intact:
                broken.append(info)
                break
    return broken


# --- making it -----------------------------------------------------------------------------------------------------


def pip_environment(env: Path) -> dict:
    """The caller's pip settings (index, certificates, find-links) without what would leak other packages in."""
    environ = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX")}
    temporary = env / "tmp"  # on the disk whose space was checked; /tmp may be a small memory disk
    temporary.mkdir(parents=True, exist_ok=True)
    environ.update(PIP_USER="0", PIP_NO_INPUT="1", PIP_DISABLE_PIP_VERSION_CHECK="1", TMPDIR=str(temporary))
    return environ


def run_logged(command: list, log: Path, environ: dict, lock_fd: int, what: str) -> None:
    """Run a command with its output in a log file; on failure show the end of it.

    The child inherits the lock: should this process be killed, the lock holds until the child has ended too.
    """
    with log.open("a") as out:
        print(f"\n$ {' '.join(command)}", file=out, flush=True)
        done = subprocess.run(
            command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, env=environ, pass_fds=(lock_fd,), check=False
        )
    if done.returncode != 0:
        tail = [line for line in log.read_text(errors="replace").splitlines() if not line.startswith("WARNING")][-15:]
        raise SetupError(
            f"{what} failed (exit status {done.returncode}); the end of {log}:\n  "
            + "\n  ".join(line[:300] for line in tail)
            + "\nRun the same command again to go on from here."
        )


def make_env(lane: Lane, python: Python | None, log: Path, lock_fd: int) -> None:
    """Create the virtual environment, or keep the one that is there when its Python and pip are sound."""
    version = env_version(lane)
    site_packages = lane.env / "lib" / "python{}.{}".format(*(version or (0, 0))[:2]) / "site-packages"
    if version is not None and version[1] in lane.minors and list(site_packages.glob("pip-*.dist-info")):
        broken = broken_distributions(site_packages)
        if not any(info.name.startswith("pip-") for info in broken):
            for leftover in [*broken, *site_packages.glob("~*")]:
                say(f"repairing {leftover.name}")
                shutil.rmtree(leftover)  # pip then installs it again over its remains
            return
    if python is None:
        raise SetupError(
            f"{lane.env}: its Python does not run and no other was found; install Python 3.{lane.minors[0]}"
        )
    if lane.env.exists():
        say(f"removing the unusable {lane.env}")
        shutil.rmtree(lane.env)
    environ = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    run_logged([python.path, "-m", "venv", str(lane.env)], log, environ, lock_fd, "creating the virtual environment")


def install(lane: Lane, python: Python | None, lock_fd: int) -> None:
    """Bring the lane's environment to what its requirements say; the stamp comes last."""
    started = time.monotonic()
    key = wanted_key(lane)
    log = ENVS / f"{lane.name}-install.log"
    log.write_text("")
    stamp_path(lane.env).unlink(missing_ok=True)
    make_env(lane, python, log, lock_fd)
    say(f"installing into {lane.env} (minutes the first time; log: {log})")
    environ = pip_environment(lane.env)
    pip = [str(lane.python), "-m", "pip", "install", "-c", str(lane.requirements)]
    # setuptools first and from the same pins: the build of this package then needs no environment of its own.
    run_logged([*pip, "setuptools"], log, environ, lock_fd, "installing setuptools")
    package = [*pip, "--no-build-isolation", "-e", f".[{EXTRAS}]"]
    run_logged(package, log, environ, lock_fd, f"installing the {lane.name} lane")
    run_logged([str(lane.python), "-c", f"import {IMPORTS}"], log, environ, lock_fd, "importing what was installed")
    missing = install_sglang(lane, log, environ, lock_fd)
    shutil.rmtree(environ["TMPDIR"], ignore_errors=True)
    python_version = ".".join(map(str, env_version(lane) or ()))
    write_stamp(lane.env, key, lane=lane.name, python=python_version, sglang_missing=missing)
    say(f"{lane.name} lane ready in {time.monotonic() - started:.0f} s" + (", without SGLang" if missing else ""))


def install_sglang(lane: Lane, log: Path, environ: dict, lock_fd: int) -> str:
    """Add SGLang to a lane that is otherwise complete; returns why it is not there, "" when it is.

    Every distribution is named with its version and installed without what it declares: SGLang's own list is 200
    packages, most of them kernels for GPUs. A half-installed SGLang is removed, so that whoever finds it can use it.
    """
    if lane.sglang_requirements is None:
        return f"the {lane.name} lane has none"
    pip = [str(lane.python), "-m", "pip"]
    try:
        command = [*pip, "install", "--no-deps", "-r", str(lane.sglang_requirements)]
        run_logged(command, log, environ, lock_fd, "installing SGLang")
        run_logged([str(lane.python), "-c", f"import {SGLANG_IMPORTS}"], log, environ, lock_fd, "importing SGLang")
    except SetupError as error:
        say(f"{error}\nGoing on without SGLang; `{sys.executable} {__file__}` tries it again.")
        run_logged([*pip, "uninstall", "-y", "sglang"], log, environ, lock_fd, "removing the unusable SGLang")
        return f"{str(error).splitlines()[0].partition(';')[0]}, log: {log}"
    return ""


@contextlib.contextmanager
def locked():
    """One set-up at a time in this checkout; yields the lock's file descriptor."""
    ENVS.mkdir(exist_ok=True)
    with (ENVS / "setup.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("another set-up is running here; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def is_settled(lane: Lane, retry: bool) -> bool:
    """Complete; with `retry` only if SGLang is not missing for a reason that may have passed."""
    return is_ready(lane) and not (retry and lane.sglang_requirements and sglang_obstacle(lane.env))


def ensure(request: str, retry: bool = False) -> Lane:
    """Choose the lane, install what is missing, return it.

    Args:
        retry: whether to try again for an SGLang that could not be installed the last time.
    """
    if request == "best" and is_settled(LANES[0], retry):
        return LANES[0]  # the usual case, without a search
    with locked() as lock_fd:
        ready = {lane.name for lane in LANES if is_ready(lane)}
        missing_gb = {lane.name: 0.0 if lane.name in ready else disk_missing_gb(lane) for lane in LANES}
        pythons = [] if len(ready) == len(LANES) else find_pythons()
        choice = choose_lane(request, pythons, ready, missing_gb)
        if not is_settled(choice.lane, retry):
            say(f"{choice.lane.name} lane on {choice.python or choice.lane.python}: {choice.reason}")
            install(choice.lane, choice.python, lock_fd)
        return choice.lane


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--lane", choices=[*(lane.name for lane in LANES), "best", "other"], default="best")
    parser.add_argument("--print-python", action="store_true", help="print the path of the environment's Python")
    arguments = parser.parse_args()
    try:
        # `make setup` tries a missing SGLang again; whoever only wants the Python is not kept waiting for it each time.
        lane = ensure(arguments.lane, retry=not arguments.print_python)
    except NoLaneError as error:
        say(str(error))
        return 0 if arguments.lane == "other" else 1
    except SetupError as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        say("interrupted; run the same command again to go on from here")
        return 130
    if arguments.print_python:
        print(lane.python)
    else:
        say(f"{lane.name} lane is ready: {lane.python}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
