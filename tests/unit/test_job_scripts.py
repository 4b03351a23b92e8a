"""The job scripts: what Slurm and a reader rely on."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from asyppo_megatron.config import load_config
from asyppo_megatron.launch import allocation

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))
NAMES = ["asyppo_14b", "asyppo_4b", "asyppo_8b", "grpo_14b", "ppo_14b"]


def test_all_scripts_are_there():
    assert [path.stem for path in SCRIPTS] == NAMES


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_nothing_stands_before_the_settings_and_every_script_can_be_requeued(path: Path):
    lines = path.read_text().splitlines()
    settings = [index for index, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert settings == list(range(1, len(settings) + 1)), "a command before #SBATCH switches it off"
    text = path.read_text()
    assert "#SBATCH --signal=B:USR1@300\n" in text and "#SBATCH --requeue\n" in text
    assert f"model_configs/runs/{path.stem}.yaml" in text
    assert len(lines) < 20


@pytest.mark.parametrize(("suffix", "more"), [("", 0), ("_disaggregated", 1)])
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_recipe_fits_the_nodes_that_its_script_asks_for(path: Path, suffix: str, more: int, monkeypatch):
    monkeypatch.setattr(allocation, "check_run", lambda config: None)  # the models are not here
    (nodes,) = (int(n) for n in re.findall(r"#SBATCH --nodes=(\d+)", path.read_text()))
    config = load_config(ROOT / "model_configs" / "runs" / f"{path.stem}{suffix}.yaml")
    facts = allocation.check_allocation(config, nodes + more, 8)
    actors = "0 1" if "14b" in path.stem else "0"
    assert facts["ranks_per_node"] == "8" and facts["agent_nodes"] == (str(nodes) if more else actors)


@pytest.mark.parametrize("path", [*SCRIPTS, *sorted((ROOT / "slurm").glob("*.sh"))], ids=lambda path: path.name)
def test_every_script_is_valid_bash(path: Path):
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, timeout=30).stderr == ""


def test_every_setting_has_its_reason():
    lines = (ROOT / "slurm" / "env.sh").read_text().splitlines()
    for index, line in enumerate(lines):
        if re.match(r"export (NCCL|TORCH|CUDA|OMP|TOKENIZERS|HF|PYTHONUNBUFFERED)|ulimit", line):
            assert "  # " in line, f"env.sh:{index + 1}: no reason"
