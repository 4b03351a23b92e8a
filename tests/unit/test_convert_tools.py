"""The converters as a user runs them: both ways exact, and every failure leaves the target as it was."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
import torch
from convert_configs import FAMILIES, tiny_config, write_checkpoint
from safetensors.torch import load_file

from asyppo_megatron.convert import pool, raw_file
from asyppo_megatron.convert.cli import main
from asyppo_megatron.convert.critic import initial_value_head
from asyppo_megatron.convert.pool import run_split, split
from asyppo_megatron.convert.progress import Progress

ROOT = Path(__file__).resolve().parents[2]
TWO = ["--processes", "2", "--quiet"]


def convert(*arguments: object) -> int:
    return main([str(a) for a in (*arguments, *TWO)])


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return {n: t for f in sorted(path.glob("*.safetensors")) for n, t in load_file(f).items()}


def assert_equal(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("dtype", "tp"), [(torch.float32, 1), (torch.bfloat16, 2)])
@pytest.mark.parametrize("role", ["actor", "critic"])
def test_both_ways_are_exact(tmp_path: Path, family: str, tied: bool, dtype: torch.dtype, tp: int, role: str) -> None:
    config = tiny_config(family, tied=tied)
    tensors = write_checkpoint(tmp_path / "hf", config, dtype=dtype, role=role, max_file_bytes=30_000)
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    assert convert("to-megatron", "--hf", tmp_path / "hf", "--out", megatron, "--tp", tp, "--role", role) == 0
    assert convert("to-hf", "--megatron", megatron, "--out", back) == 0  # the role is in its config
    assert_equal(tensors_of(back), tensors)
    assert (back / "tokenizer.json").exists() and (back / "generation_config.json").exists()


@pytest.mark.parametrize("ep", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixture_of_experts_is_exact_both_ways(tmp_path: Path, ep: int, dtype: torch.dtype) -> None:
    tensors = write_checkpoint(tmp_path / "hf", tiny_config("qwen3_moe"), dtype=dtype)
    layout = ["--tp", 2, "--ep", ep]
    assert convert("to-megatron", "--hf", tmp_path / "hf", "--out", tmp_path / "m", *layout) == 0
    assert convert("to-hf", "--megatron", tmp_path / "m", "--out", tmp_path / "h", *layout) == 0
    assert_equal(tensors_of(tmp_path / "h"), tensors)


@pytest.mark.parametrize("normalised", [True, False])
def test_mixture_of_experts_has_the_logits_of_transformers(tmp_path: Path, normalised: bool) -> None:
    write_checkpoint(tmp_path / "hf", tiny_config("qwen3_moe", norm_topk_prob=normalised))
    command = [sys.executable, "-m", "asyppo_megatron", "convert", "to-megatron", "--verify", *TWO]
    command += ["--hf", str(tmp_path / "hf"), "--out", str(tmp_path / "m")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    can_look = metadata.version("megatron-core") >= "0.17"  # 0.16's router needs Transformer Engine
    assert ("tensors are equal, logits agree to" if can_look else "tensors are equal") in done.stdout


def test_result_loads_in_transformers_without_a_word(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    write_checkpoint(tmp_path / "hf", tiny_config(tied=True))
    for role, auto in (("actor", AutoModelForCausalLM), ("critic", AutoModelForTokenClassification)):
        megatron, back = tmp_path / f"m-{role}", tmp_path / f"h-{role}"
        assert convert("to-megatron", "--hf", tmp_path / "hf", "--out", megatron, "--role", role) == 0
        assert convert("to-hf", "--megatron", megatron, "--out", back) == 0
        model, info = auto.from_pretrained(back, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        assert model.config.num_labels == 1 or role == "actor"


@pytest.mark.parametrize(("head", "seed"), [("zero", None), ("random", 3)])
def test_new_critic_gets_a_head(tmp_path: Path, head: str, seed: int | None) -> None:
    write_checkpoint(tmp_path / "hf", tiny_config())
    arguments = ["--head", head] + (["--seed", seed] if seed is not None else [])
    out = tmp_path / "m"
    assert convert("to-megatron", "--hf", tmp_path / "hf", "--out", out, "--role", "critic", *arguments) == 0
    assert convert("to-hf", "--megatron", out, "--out", tmp_path / "h") == 0
    got, (weight, bias) = tensors_of(tmp_path / "h"), initial_value_head(32, seed)
    assert torch.equal(got["score.weight"], weight) and torch.equal(got["score.bias"], bias)
    assert "lm_head.weight" not in got


def test_dtype_is_what_was_asked_for(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path / "hf", tiny_config())
    assert convert("to-megatron", "--hf", tmp_path / "hf", "--out", tmp_path / "m", "--dtype", "bf16", "--verify") == 0
    assert convert("to-hf", "--megatron", tmp_path / "m", "--out", tmp_path / "h", "--dtype", "fp32", "--verify") == 0
    assert_equal(tensors_of(tmp_path / "h"), {n: t.bfloat16().float() for n, t in tensors.items()})


def test_scripts_verify_logits_too(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hf", tiny_config("llama", tied=True))
    megatron, back = tmp_path / "m", tmp_path / "h"
    for script, *arguments in (
        ("hf_to_megatron.py", "--hf", tmp_path / "hf", "--out", megatron, "--tp", 2),
        ("megatron_to_hf.py", "--megatron", megatron, "--out", back),
    ):
        command = [sys.executable, ROOT / "tools" / "convert" / script, *arguments, "--verify", *TWO]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert "20 tensors are equal, logits agree to" in done.stdout


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "hf", tiny_config())
    assert convert("to-megatron", "--hf", tmp_path / "hf", "--tp", 2, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "names and shapes agree at tp 2" in out and "the checkpoint's tensors agree too" in out
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tp", "3"], "got 3, need a divisor of the model's num_heads 4"),
        (["--ep", "2"], "ep: got 2, need a divisor of the model's 0 experts"),
        ([], "got an existing directory, need a new one"),
    ],
)
def test_wrong_arguments_leave_the_target(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "hf", tiny_config())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    assert convert("to-megatron", "--hf", tmp_path / "hf", "--out", tmp_path / "out", *arguments) == 1
    assert message in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["precious"]


def test_missing_parameter_and_truncated_data_file_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "hf", tiny_config())
    convert("to-megatron", "--hf", tmp_path / "hf", "--out", tmp_path / "m")
    config = tmp_path / "m" / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    assert convert("to-hf", "--megatron", tmp_path / "m", "--out", tmp_path / "h") == 1
    assert "decoder.layers.2.input_layernorm.weight: got 0 of 32 elements" in capsys.readouterr().err
    config.write_text(text.replace('"intermediate_size": 48', '"intermediate_size": 64'))
    assert convert("to-hf", "--megatron", tmp_path / "m", "--out", tmp_path / "h") == 1
    assert "linear_fc1.weight: got shape (96, 32), need (128, 32)" in capsys.readouterr().err
    config.write_text(text)
    data = tmp_path / "m" / "__1_0.distcp"
    os.truncate(data, data.stat().st_size - 10)
    assert convert("to-hf", "--megatron", tmp_path / "m", "--out", tmp_path / "h") == 1
    error = capsys.readouterr().err
    assert "__1_0.distcp" in error and "missing or truncated" in error
    assert not (tmp_path / "h").exists()


@pytest.mark.parametrize("direction", ["to-megatron", "to-hf"])
def test_full_disk_is_named_and_leaves_nothing(
    tmp_path: Path, direction: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "hf", tiny_config())
    convert("to-megatron", "--hf", tmp_path / "hf", "--out", tmp_path / "m")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    source = ("--megatron", tmp_path / "m") if direction == "to-hf" else ("--hf", tmp_path / "hf")
    monkeypatch.setattr(raw_file.os, "pwrite", full)
    monkeypatch.setattr(raw_file.os, "sendfile", full)
    assert convert(direction, *source, "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "No space left on device; free space there" in error and ".out.partial" in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "m"]


def test_result_is_the_same_where_the_kernel_copies_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = write_checkpoint(tmp_path / "hf", tiny_config())

    def refuse(*_: object) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(raw_file.os, "sendfile", refuse)
    assert convert("to-megatron", "--hf", tmp_path / "hf", "--out", tmp_path / "m", "--tp", 2) == 0
    assert convert("to-hf", "--megatron", tmp_path / "m", "--out", tmp_path / "h") == 0
    assert_equal(tensors_of(tmp_path / "h"), tensors)


@pytest.mark.parametrize("victim", ["parent", "child"])
def test_kill_in_mid_conversion_leaves_no_target(tmp_path: Path, victim: str) -> None:
    write_checkpoint(tmp_path / "hf", tiny_config())
    slow = (
        "import sys, time; from asyppo_megatron.convert import to_megatron, cli; real = to_megatron.write_parameter\n"
        "def wait(*a): time.sleep(0.2); return real(*a)\n"
        "to_megatron.write_parameter = wait; sys.exit(cli.main(sys.argv[1:]))"
    )
    command = [
        sys.executable,
        "-c",
        slow,
        "to-megatron",
        "--hf",
        str(tmp_path / "hf"),
        "--out",
        str(tmp_path / "m"),
        *TWO,
    ]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    partial = tmp_path / ".m.partial"
    deadline = time.monotonic() + 60
    while not list(partial.glob("__1_*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid if victim == "parent" else int(children[-1]), signal.SIGKILL)
    error = process.communicate(timeout=60)[1]
    assert not (tmp_path / "m").exists()
    if victim == "child":
        assert process.returncode == 1 and "a converter process was killed by signal SIGKILL" in error
        assert not partial.exists()
        return
    while any(Path(f"/proc/{c}").exists() for c in children) and time.monotonic() < deadline:
        time.sleep(0.05)  # they see that their parent is gone
    assert convert("to-megatron", "--hf", tmp_path / "hf", "--out", tmp_path / "m") == 0


def test_split_keeps_order_and_balances_bytes() -> None:
    assert split([10, 10, 10, 10], 2) == [range(2), range(2, 4)]
    assert split([100, 1, 1, 1], 2) == [range(1), range(1, 4)]
    assert split([1], 4) == [range(1)]
    assert [i for part in split([3, 5, 1, 9, 2, 2], 3) for i in part] == list(range(6))


def test_an_error_in_one_process_ends_all() -> None:
    def work(index: int, items: range, report: object) -> None:
        if index == 1:
            raise ValueError("tensor x: broken")
        time.sleep(60)

    started = time.monotonic()
    with pytest.raises(ValueError, match="tensor x: broken"):
        run_split(work, [1, 1], processes=2, progress=Progress("x", 2, quiet=True))
    assert time.monotonic() - started < 10


def test_progress_says_bytes_speed_and_time_left() -> None:
    progress = Progress("a -> b", 4_000_000_000, quiet=True)
    progress._started -= 2
    line = progress._line(1_000_000_000)
    assert line.startswith("a -> b: 1.00/4.00 GB  25%, ") and line.endswith("6 s left")


def test_default_processes_is_small() -> None:
    assert 1 <= pool.default_processes() <= 4
