"""The demo itself: reinforcement learning finds the style that is right."""

from __future__ import annotations

from pathlib import Path

import pytest
from e2e_runs import Asyppo, steps

from asyppo_megatron.observability.metrics import read_metrics, read_series

CRITICS = 2


@pytest.fixture(scope="module")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first demo puts its base models and the second finds them."""
    return tmp_path_factory.mktemp("demo") / "data"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_demo_learns(asyppo: Asyppo, demo_data: Path, tmp_path, seed):
    run_dir = tmp_path / "run"
    command = asyppo.demo(
        run_dir,
        f"--data={demo_data}",
        f"run_dir={run_dir}",
        f"seed={seed}",
        f"actor.model={demo_data / 'base-actor'}",
        f"critics.*.model={demo_data / 'base-critic'}",
        f"data.train={demo_data / 'rl_train.jsonl'}",
        f"data.eval.0.path={demo_data / 'heldout.jsonl'}",
        f"data.tokenizer={demo_data / 'tokenizer'}",
    )
    rows = read_metrics(run_dir)
    _, greedy = read_series(rows, "eval/heldout/greedy")
    assert greedy[0] <= 0.35
    assert greedy[-1] >= 0.90
    assert all(row["memory/peak_gb"] <= 1.2 for row in steps(run_dir))
    for critic in range(CRITICS):
        assert read_series(rows, f"explained_variance/critic_{critic}")[1][-1] > 0
    assert "eval/heldout/greedy" in command.out and (run_dir / "learning_curve.png").exists()
    assert ("made the base models" in command.err) == (seed == 0)
