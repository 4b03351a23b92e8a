"""`asyppo plan` against measurement: state to the byte on real ranks, the peak of an update within a tenth."""

from __future__ import annotations

from pathlib import Path

import pytest
from convert_world import all_cases, run_world
from plan_world import Case, count_bytes, peak_of_update, spec_and_config

from asyppo_megatron.plan.parameters import state_bytes

CASES = [
    Case("qwen3", False, "bf16", 2, 1),
    Case("qwen3", True, "bf16", 1, 2),
    Case("qwen3", True, "fp32", 2, 2),
    Case("qwen2", False, "fp32", 1, 1),
    Case("qwen2", True, "bf16", 2, 1, "critic"),
    Case("llama", False, "bf16", 1, 2, "critic"),
    Case("llama", True, "bf16", 4, 1),
    Case("qwen3", False, "bf16", 2, 1, "actor", False),
]


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    ranks = run_world(4, tmp_path_factory.mktemp("plan"), all_cases, count_bytes, CASES)
    for result in ranks:
        assert isinstance(result, dict), result
    return ranks


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_state_is_predicted_to_the_byte_on_every_rank(case: Case, counted: list[dict]) -> None:
    spec, config = spec_and_config(case)
    for rank in counted:
        found = rank[case.name]
        assert isinstance(found, dict), found
        expected = state_bytes(spec, case.role, config, found["at"].pp)[found["at"].dp]
        got = (found["parameters"], found["gradients"], found["optimizer"])
        assert got == (expected.parameters, expected.gradients, expected.optimizer), found["at"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "length", "recompute"), [(128, 64, "none"), (512, 128, "none"), (1024, 128, "full")]
)
def test_peak_of_an_update_is_predicted_within_a_tenth(
    tmp_path: Path, tokens: int, length: int, recompute: str
) -> None:
    (result,) = run_world(1, tmp_path, peak_of_update, tokens, recompute, length)
    assert isinstance(result, tuple), result
    measured, planned = result
    assert measured == pytest.approx(planned, rel=0.1), f"{measured / 1e6:.0f} MB, planned {planned / 1e6:.0f}"
