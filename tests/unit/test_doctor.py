"""`asyppo doctor`: what would break a run is found, named and ends in exit code 1."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from asyppo_megatron import doctor
from asyppo_megatron.cli import main


def rows_by_name(path: Path) -> dict[str, doctor.Row]:
    return {row.what: row for row in doctor.check_machine(path)}


def test_the_test_environment_is_sound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_by_name(tmp_path / "not" / "yet" / "there")
    for name in ("Python", "torch", "megatron-core", "write access", "ports", "clocks"):
        assert rows[name].is_fine, rows[name]
    main(["doctor", "--dir", str(tmp_path)])
    assert "megatron-core" in capsys.readouterr().out


def test_missing_room_is_a_problem_with_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "MIN_DISK", 1e30)
    assert main(["doctor", "--dir", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "BAD  free disk" in out and "problem(s)" in out


def test_versions_outside_the_range_are_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"torch": (2, 9), "megatron-core": (0, 20, 0), "transformer-engine": (2, 1), "psutil": None}
    real = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: found[name] if name in found else real(name))
    rows = rows_by_name(tmp_path)
    assert not any(rows[n].is_fine for n in ("torch", "megatron-core", "Transformer Engine", "psutil"))
    assert rows["Transformer Engine"].found == "2.1 without its torch part"


def test_clocks_of_a_slurm_allocation_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    srun = tmp_path / "srun"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_NNODES", "2")
    for times, is_fine in (("100.0\\n100.5", True), ("100.0\\n1000.0", False), ("no time", False)):
        srun.write_text(f"#!/bin/sh\nprintf '{times}\\n'\n")
        srun.chmod(0o755)
        assert rows_by_name(tmp_path)["clocks"].is_fine == is_fine


def test_what_a_run_needs_is_looked_for(tmp_path: Path) -> None:
    from asyppo_megatron.config import build_config

    tree = {"actor": {"model": "/nowhere"}, "critics": [], "method": "grpo", "data": {"train": "/nowhere.jsonl"}}
    tree["data"]["eval"] = [{"name": "math", "path": "/nowhere.jsonl"}]
    rows = {row.what: row for row in doctor.check_machine(tmp_path, build_config(tree))}
    for what in ("model of actor", "training data", "evaluation data math"):
        assert not rows[what].is_fine


def test_version_is_read_up_to_its_first_word() -> None:
    assert doctor.version("torch") is not None and doctor.version("no-such-distribution") is None
