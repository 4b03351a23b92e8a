"""`asyppo eval`: sets from the configuration and the command line, errors before a weight is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from asyppo_megatron.cli import main
from asyppo_megatron.demo.prepare import build_tokenizer
from asyppo_megatron.prepare import ModelSizes, prepare_model


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, two sets and a configuration whose actor does not exist."""
    directory = tmp_path_factory.mktemp("eval")
    build_tokenizer().save_pretrained(directory / "tokenizer")
    prepare_model(directory / "tokenizer", directory / "model", ModelSizes(hidden=32, head_dim=8, ffn=64))
    for name, count in (("a", 3), ("b", 2)):
        rows = [{"id": str(i), "problem": f"^{i}+1=", "answer": str(i + 1)} for i in range(count)]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "run_dir": str(directory / "run"),
        "actor": {"model": "nowhere", "precision": "fp32"},
        "ppo": {"advantage": "grpo", "advantage_mask_fraction": 0, "entropy_mask_fraction": 0},
        "rollout": {"max_prompt_tokens": 8, "max_response_tokens": 6},
        "reward": {"kind": "exact"},
        "data": {
            "train": "nowhere.jsonl",
            "eval": [{"name": "a", "path": str(directory / "a.jsonl")}],
            "chat_template": "none",
        },
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(tree))
    return directory


def command(files: Path, *more: str) -> list[str]:
    return ["eval", str(files / "config.yaml"), "--model", str(files / "model"), *more]


def test_sets_of_the_configuration_and_of_the_command_line(files: Path, tmp_path: Path, capsys):
    more = ["--set", f"b={files / 'b.jsonl'}", "--samples", "2", "--out", str(tmp_path / "out"), "eval.temperature=1.0"]
    assert main(command(files, *more)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["a", "b"]
    assert lines[0].startswith("a: greedy 0.0000, avg@2 ")
    assert lines[0].endswith("on 3 problems (0 skipped)")
    rows = [json.loads(line) for line in (tmp_path / "out/b.jsonl").read_text().splitlines()]
    assert [(row["id"], row["answer"], len(row["samples"])) for row in rows] == [("0", "1", 2), ("1", "2", 2)]


def test_results_lie_in_the_run_directory_and_a_set_can_be_replaced(files: Path, capsys):
    assert main(command(files, "--set", f"a={files / 'b.jsonl'}")) == 0
    assert capsys.readouterr().out == "a: greedy 0.0000 on 2 problems (0 skipped)\n"
    assert len((files / "run/eval/model/a.jsonl").read_text().splitlines()) == 2


def test_everything_that_is_missing_is_told_at_once(files: Path, tmp_path: Path, capsys):
    arguments = ["eval", str(files / "config.yaml"), "--model", str(tmp_path), "--set", "x/y=none.jsonl"]
    assert main([*arguments, "eval.greedy=false"]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("configuration: 6 error(s)")
    for message in (
        "--model: ",
        "has no *.safetensors file",
        "data.tokenizer: nowhere has no tokenizer.json",
        "data.eval.name: got 'x/y'",
        "data.eval x/y: none.jsonl does not exist",
        "eval: got greedy false and samples 0",
    ):
        assert message in errors


def test_a_model_that_is_too_short_is_refused(files: Path, capsys):
    assert main(command(files, "rollout.max_response_tokens=5000")) == 1
    assert "--model: got 4096 positions, need 5008 for prompt and response" in capsys.readouterr().err


def test_bad_options_are_refused(files: Path, capsys):
    for bad in (["--set", "nothing"], ["--samples", "0"], ["--what"]):
        with pytest.raises(SystemExit):
            main(command(files, *bad))
    errors = capsys.readouterr().err
    for message in ("need NAME=PATH", "need a number >= 1", "unrecognized arguments: --what"):
        assert message in errors
