"""`asyppo doctor`: what of this machine would break a run, before a run finds out."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from asyppo_megatron.config import Config

MIN_PYTHON, MIN_TORCH, MEGATRON = (3, 11), (2, 11), ((0, 16, 1), (0, 20))
MIN_DISK, MIN_SHARED = 20e9, 2e9  # bytes
MAX_CLOCK_S = 5.0  # between nodes: supervisors compare times of files that others wrote
_COMMAND_S = 60


@dataclass(frozen=True)
class Row:
    """One finding.

    Attributes:
        is_fine: false: a run would break.
        advice: what to do, where it is not fine or could be better.
    """

    what: str
    found: str
    is_fine: bool = True
    advice: str = ""


def version(name: str) -> tuple[int, ...] | None:
    """Numbers of an installed distribution's version; None where it is not installed."""
    try:
        text = metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
    numbers = []
    for part in text.split("+")[0].split("."):
        digits = "".join(c for c in part if c.isdigit())
        if not digits or not part[0].isdigit():
            break
        numbers.append(int(digits))
    return tuple(numbers)


def _text(numbers: tuple[int, ...] | None) -> str:
    return "not installed" if numbers is None else ".".join(map(str, numbers))


def check_machine(directory: Path, config: Config | None = None) -> list[Row]:
    """Everything about this machine; with a configuration also what that run needs of it."""
    gpus = _gpus()
    checks: list[Callable[[], Iterable[Row]]] = [
        _software, lambda: _acceleration(gpus), lambda: _engine(config, gpus), lambda: _places(directory),
        _ports, _clocks,
    ]  # fmt: skip
    rows = [row for check in checks for row in check()]
    if config is not None:
        rows += _needs(config, gpus)
    return rows


def _software() -> Iterable[Row]:
    python = sys.version_info[:3]
    yield Row("Python", ".".join(map(str, python)), python >= MIN_PYTHON, f"need {'.'.join(map(str, MIN_PYTHON))}")
    torch, megatron = version("torch"), version("megatron-core")
    yield Row("torch", _text(torch), torch is not None and torch >= MIN_TORCH, "need >= 2.11; see requirements/")
    fits = megatron is not None and MEGATRON[0] <= megatron < MEGATRON[1]
    yield Row("megatron-core", _text(megatron), fits, "need >= 0.16.1, < 0.20")
    for name, why in (("transformers", "reads models"), ("safetensors", "reads weights"), ("psutil", "saves need it")):
        yield Row(name, _text(version(name)), version(name) is not None, f"install it: {why}")


def _gpus() -> list[str]:
    """Names and memory of the GPUs, asked without starting CUDA."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    query = [command, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_COMMAND_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def _acceleration(gpus: list[str]) -> Iterable[Row]:
    import torch

    yield Row("GPUs", f"{len(gpus)}: {gpus[0]}" if gpus else "none: runs on the CPU over gloo")
    usable = torch.cuda.device_count() if gpus else 0
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") is not None
    works = usable == len(gpus) or (hidden and usable > 0)
    yield Row(
        "CUDA of torch", str(torch.version.cuda), works, "torch does not see the GPUs: check the driver's version"
    )
    if gpus:
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "none"
        yield Row("NCCL", nccl, nccl != "none", "install a torch with NCCL")
    engine = version("transformer-engine")
    torch_part = version("transformer-engine-torch")
    broken = engine is not None and torch_part is None
    found = f"{_text(engine)}{' without its torch part' if broken else ''}"
    yield Row("Transformer Engine", found, not broken, "uninstall it or install transformer-engine[pytorch,core_cu13]")
    apex = version("apex")
    foreign = apex is not None and importlib.util.find_spec("apex.optimizers") is None if apex else False
    advice = "this apex is another project of that name: uninstall it, or install NVIDIA's from source"
    yield Row("apex", "not installed (optional)" if apex is None else _text(apex), not foreign, advice)


def _engine(config: Config | None, gpus: list[str]) -> Iterable[Row]:
    sglang, wanted = version("sglang"), config is not None and config.rollout.engine == "sglang"
    yield Row(
        "SGLang", _text(sglang), sglang is not None or not wanted, "install the production lane, or engine=embedded"
    )
    if sglang is not None and gpus and importlib.util.find_spec("sgl_kernel") is None:
        yield Row("sgl_kernel", "not installed", not wanted, "install SGLang with its own requirements")


def _places(directory: Path) -> Iterable[Row]:
    existing = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=existing):
            yield Row("write access", str(existing))
    except OSError as e:
        yield Row("write access", f"{existing}: {e.strerror}", False, "choose another run_dir")
    free = shutil.disk_usage(existing).free
    yield Row("free disk", f"{free / 1e9:.0f} GB in {existing}", free >= MIN_DISK, f"need {MIN_DISK / 1e9:.0f} GB")
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        advice = "need 2 GB for weights and NCCL: give the container more (--shm-size) or set weight_sync.dir"
        yield Row("shared memory", f"{free / 1e9:.1f} GB", free >= MIN_SHARED, advice)
    else:
        yield Row("shared memory", "no /dev/shm", False, "mount it: NCCL and the weights' way need it")


def _ports() -> Iterable[Row]:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), 5):
            yield Row("ports", "loopback works")
    except OSError as e:
        yield Row("ports", f"loopback: {e.strerror}", False, "engines and the driver talk over 127.0.0.1: allow it")
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if address:
        try:
            socket.getaddrinfo(address, port)
            yield Row("MASTER_ADDR", address)
        except OSError as e:
            yield Row("MASTER_ADDR", f"{address}: {e}", False, "need a name that all nodes resolve")


def _clocks() -> Iterable[Row]:
    """Clocks of the nodes of a Slurm allocation, as `srun` reads them; nothing to compare elsewhere."""
    nodes, srun = int(os.environ.get("SLURM_NNODES", "1")), shutil.which("srun")
    if nodes < 2 or srun is None:
        yield Row("clocks", "one node: nothing to compare")
        return
    command = [srun, "--ntasks-per-node=1", "-n", str(nodes), "--overlap", "date", "+%s.%N"]
    begun = time.time()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_S, check=True)
        times = [float(line) for line in done.stdout.split()]
    except (OSError, subprocess.SubprocessError, ValueError) as e:
        yield Row("clocks", f"srun: {e}", False, "`srun date` must work in the allocation")
        return
    spread = max(max(times) - min(times) - (time.time() - begun), 0.0)  # tasks do not start at the same moment
    yield Row("clocks", f"{len(times)} nodes within {spread:.1f} s", spread <= MAX_CLOCK_S, "synchronise them (chrony)")


def _needs(config: Config, gpus: list[str]) -> Iterable[Row]:
    nodes = int(os.environ.get("SLURM_NNODES", "1"))
    if gpus:
        have = len(gpus) * nodes
        advice = "let roles share ranks, or start it on more nodes"
        yield Row("GPUs of the run", f"{config.num_ranks} ranks, {have} GPUs", config.num_ranks <= have, advice)
    for name, role in config.roles().items():
        there = (role.model / "config.json").is_file()
        yield Row(f"model of {name}", str(role.model), there, "no config.json there: download the model")
    for source in config.data.all_sources:
        what = f"training data {source.name}" if config.data.sources else "training data"
        yield Row(what, str(source.path), source.path.is_file(), "make it with `asyppo prepare data`")
    for found in config.data.eval:
        yield Row(f"evaluation data {found.name}", str(found.path), found.path.is_file(), "make it likewise")


def table(rows: list[Row]) -> str:
    """Findings for the terminal."""
    widths = [max(len(r.what) for r in rows), max(len(r.found) for r in rows)]
    lines = [
        f"{'ok ' if r.is_fine else 'BAD'}  {r.what:<{widths[0]}}  {r.found:<{widths[1]}}"
        + ("" if r.is_fine else f"  {r.advice}")
        for r in rows
    ]
    bad = sum(not r.is_fine for r in rows)
    return "\n".join(
        [*(line.rstrip() for line in lines), "", f"{bad} problem(s)" if bad else "nothing would break a run"]
    )
