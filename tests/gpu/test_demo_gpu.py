"""The demo on one GPU: it learns in bf16, agrees with the CPU in fp32, and its memory by phase is known.

Every run is a process of its own: CUDA must not start in the one that runs the tests. With Transformer Engine
installed each test runs twice, the second time with it hidden. Results go to benchmarks/results/demo_gpu.json.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "model_configs/runs/demo_gpu.yaml"
RESULT = ROOT / "benchmarks/results/demo_gpu.json"
QUIET = ("eval={every: 0}", "checkpoint={every: 0, at_end: false, export_hf: false}")
FP32 = ("actor.precision=fp32", "critics.*.precision=fp32")

HAS_TE = importlib.util.find_spec("transformer_engine") is not None
LAYERS = [
    pytest.param("torch", id="torch"),
    pytest.param(
        "transformer-engine",
        id="transformer-engine",
        marks=pytest.mark.skipif(not HAS_TE, reason="Transformer Engine not installed"),
    ),
]


def environment(layers: str, directory: Path, *, gpu: bool) -> dict[str, str]:
    """Variables of a child process that sees the GPU or not, and Transformer Engine or not."""
    env = os.environ | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    paths = [str(ROOT)]
    if not gpu:
        env["CUDA_VISIBLE_DEVICES"] = ""
    if layers == "torch" and HAS_TE:
        hidden = directory / "hidden/transformer_engine"
        hidden.mkdir(parents=True, exist_ok=True)
        (hidden / "__init__.py").write_text("raise ImportError('hidden by a test')\n")
        paths.insert(0, str(hidden.parent))
    env["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    return env


def run(command: list[str], env: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


def train(data: Path, run_dir: Path, env: dict[str, str], *overrides: str) -> list[dict]:
    """Run the recipe on the models and problems in `data`; its metrics rows."""
    settings = [
        f"run_dir={run_dir}",
        f"actor.model={data / 'base-actor'}",
        f"critics.*.model={data / 'base-critic'}",
        f"data.train={data / 'rl_train.jsonl'}",
        f"data.eval.0.path={data / 'heldout.jsonl'}",
        f"data.tokenizer={data / 'tokenizer'}",
        *overrides,
    ]
    run(["-m", "asyppo_megatron", "train", str(CONFIG), *settings], env)
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def record(name: str, values: dict) -> None:
    """Add a result to the file, and print it."""
    print(f"\n{name}: {json.dumps(values, indent=1)}")
    found = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    command = [sys.executable, str(ROOT / "benchmarks/machine.py")]
    machine = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps({**found, "machine": json.loads(machine.stdout), name: values}, indent=1) + "\n")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's problems and base models, trained on the GPU by one rank."""
    directory = tmp_path_factory.mktemp("demo") / "data"
    code = (
        "import sys; from pathlib import Path; from asyppo_megatron.demo.run import prepare_base_models; "
        "prepare_base_models(Path(sys.argv[1]))"
    )
    run(["-c", code, str(directory)], environment("torch", directory.parent, gpu=True))
    return directory


@pytest.fixture(scope="module")
def cpu_step(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """The first step in fp32 on the CPU: the run directory, whose rollouts are kept, and its metrics."""
    run_dir = tmp_path_factory.mktemp("cpu") / "run"
    env = environment("torch", run_dir.parent, gpu=False)
    (row,) = train(data, run_dir, env, "num_steps=1", *QUIET, *FP32)
    return run_dir, row


@pytest.mark.parametrize("layers", LAYERS)
def test_the_demo_learns_in_bf16_on_one_gpu(data: Path, tmp_path: Path, layers: str):
    rows = train(data, tmp_path / "run", environment(layers, tmp_path, gpu=True))
    accuracy = {row["step"]: row["eval/heldout/greedy"] for row in rows if "eval/heldout/greedy" in row}
    steps = [row for row in rows if "loss/actor" in row]
    assert [row["step"] for row in steps] == list(range(1, 41))
    record(
        f"demo, bf16, {layers}",
        {
            "held-out greedy accuracy by step": accuracy,
            "median seconds by phase": {k: median(steps, k) for k in steps[-1] if k.startswith("seconds/")},
            "peak memory by phase, GiB": {k: round(max(r[k] for r in steps), 4) for k in memory_keys(steps[-1])},
            "mean mismatch of engine and trainer, nats": max(row["mismatch_mean"] for row in steps),
        },
    )
    assert accuracy[40] >= max(0.8, accuracy[0] + 0.3)
    assert max(row["mismatch_mean"] for row in steps) < 0.05  # two bf16 computations of the same logprobs
    phases = {
        "memory/actor_logprobs_gb",
        "memory/actor_update_gb",
        "memory/critic_update_gb",
        "memory/critic_values_gb",
    }
    assert phases <= set(memory_keys(steps[-1]))
    assert steps[-1]["memory/peak_gb"] >= max(steps[-1][name] for name in phases)
    assert (tmp_path / "run/hf/actor/config.json").is_file()


@pytest.mark.parametrize("layers", LAYERS)
def test_the_first_step_in_fp32_agrees_with_the_cpu(data: Path, cpu_step, tmp_path: Path, layers: str):
    """Both see the same rollouts: the GPU's driver finds those of the CPU in its journal."""
    cpu_dir, cpu = cpu_step
    shutil.copytree(cpu_dir / "rollouts", tmp_path / "run/rollouts")
    (gpu,) = train(data, tmp_path / "run", environment(layers, tmp_path, gpu=True), "num_steps=1", *QUIET, *FP32)
    assert "replayed from the journal" in (tmp_path / "run/logs/driver.log").read_text()
    compared = ["loss/actor", "grad_norm/actor", "entropy", "value_std", "advantage_std"]
    compared += [f"{what}/critic_{m}" for what in ("loss", "grad_norm", "explained_variance") for m in (0, 1)]
    record(f"first step, fp32, {layers}: [cpu, gpu]", {name: [cpu[name], gpu[name]] for name in compared})
    # The rollouts' logprobs are the CPU engine's, so this is the GPU's difference from the CPU token by token.
    assert cpu["mismatch_max"] < 1e-4
    assert gpu["mismatch_max"] < 1e-4
    for name in compared:
        # A mask may flip where two sigmas at the cut differ by rounding alone: one of thousands of tokens.
        tolerance = 1e-2 if name.endswith("/actor") else 1e-3
        assert gpu[name] == pytest.approx(cpu[name], rel=tolerance, abs=1e-3), name
    for name in ("masked_advantage_fraction", "masked_entropy_fraction", "reward", "response_length"):
        assert gpu[name] == cpu[name], name


OPERATORS = {"triton": (), "reference": ("kernels=reference",), "fused head": ("actor.fused_head=true",)}


@pytest.fixture(scope="module")
def first_steps(data: Path, cpu_step, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """The first step in fp32 on the GPU from the same rollouts, with every implementation of the operators."""
    found = {}
    for name, overrides in OPERATORS.items():
        directory = tmp_path_factory.mktemp("operators")
        shutil.copytree(cpu_step[0] / "rollouts", directory / "run/rollouts")
        env = environment("torch", directory, gpu=True)
        (found[name],) = train(data, directory / "run", env, "num_steps=1", *QUIET, *FP32, *overrides)
    return found


@pytest.mark.parametrize("name", ["triton", "fused head"])
def test_kernels_and_the_head_without_logits_do_what_plain_torch_does(first_steps: dict[str, dict], name: str):
    expected, row = first_steps["reference"], first_steps[name]
    compared = ["loss/actor", "grad_norm/actor", "entropy", "approx_kl", "clip_fraction", "advantage_std"]
    record(f"first step, fp32, [reference, {name}]", {key: [expected[key], row[key]] for key in compared})
    for key in compared:
        assert row[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-5), key


def memory_keys(row: dict) -> list[str]:
    return [name for name in row if name.startswith("memory/")]


def median(rows: list[dict], name: str) -> float:
    values = sorted(row[name] for row in rows if name in row)
    return round(values[len(values) // 2], 4)
