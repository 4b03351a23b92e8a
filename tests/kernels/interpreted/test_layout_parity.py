"""The actor on the kernels agrees with Hugging Face + `ppo/` in one process, in a few layouts: as on plain torch."""

from __future__ import annotations

from pathlib import Path

import pytest
from parity_world import run_forked
from test_parity_actor import SMALL, Case, check_case, make_reference, run_cases

RANKS = 2
CASES = [
    Case("triton-tp2-sp", (0, 1), tied=True, tp=2, kernels="triton"),
    Case("triton-cp2", (0, 1), tied=False, cp=2, kernels="triton"),
    Case("triton-fused-tp2-sp", (0, 1), tied=True, tp=2, fused=True, max_tokens=SMALL, kernels="triton"),
]


@pytest.fixture(scope="module")
def directory(device, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("megatron.core")
    if device.type != "cpu":
        pytest.skip("ranks share no GPU here")
    path = tmp_path_factory.mktemp("parity")
    run_forked(0, path, make_reference, path)
    run_forked(RANKS, path, run_cases, path, CASES, timeout_s=900)
    return path


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_loss_logprobs_gradients_and_update_agree_with_one_process(case: Case, directory: Path) -> None:
    check_case(directory, case)
