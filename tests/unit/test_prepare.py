"""`asyppo prepare`: rows are converted or refused with their line numbers; a small model fits its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from asyppo_megatron.cli import main
from asyppo_megatron.demo.prepare import build_tokenizer
from asyppo_megatron.models.spec import ModelSpec
from asyppo_megatron.prepare import DataKeys, ModelSizes, prepare_data, prepare_model

GSM8K = DataKeys(answer_after="####")
GOOD = {"question": "What is 6*3?", "answer": "6*3 = 18 #### is the rule.\n#### 18 "}


def write(path: Path, *rows: dict | str) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_gsm8k_rows_become_problems(tmp_path: Path):
    source = write(tmp_path / "train.jsonl", GOOD, "", {**GOOD, "id": 7})
    assert prepare_data(source, tmp_path / "out/data.jsonl", GSM8K) == 2
    assert read(tmp_path / "out/data.jsonl") == [
        {"id": "train-0", "problem": "What is 6*3?", "answer": "18"},
        {"id": "7", "problem": "What is 6*3?", "answer": "18"},
    ]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["data.jsonl"]


def test_other_keys_are_named(tmp_path: Path):
    source = write(tmp_path / "a.jsonl", {"q": "1+1", "a": 2, "name": "x"})
    prepare_data(source, tmp_path / "b.jsonl", DataKeys(problem="q", answer="a", id="name"))
    assert read(tmp_path / "b.jsonl") == [{"id": "x", "problem": "1+1", "answer": "2"}]


@pytest.mark.parametrize(
    ("row", "keys", "message"),
    [
        ("{not json", GSM8K, "is not JSON"),
        ("[1]", GSM8K, "got a JSON list, need an object"),
        ({"question": "x"}, GSM8K, "got no key 'answer', need one; the row has ['question'] (--answer-key"),
        ({"question": " ", "answer": "#### 1"}, GSM8K, "question: got ' ', need a non-empty string"),
        ({"question": "x", "answer": "18"}, GSM8K, "answer: got no '####' in '18'"),
        ({"question": "x", "answer": "so ####"}, GSM8K, "answer: got nothing after '####'"),
        (
            {"question": "x", "answer": "so #### 1"},
            DataKeys(),
            "answer: got a solution with '####' in it, need an answer; add --answer-after '####'",
        ),
        ({**GOOD, "id": "train-0"}, GSM8K, "id 'train-0' is that of line 1"),
    ],
)
def test_a_wrong_row_is_refused_with_its_line(tmp_path: Path, row: dict | str, keys: DataKeys, message: str):
    first = {"question": "x", "answer": "18"} if not keys.answer_after else GOOD
    source = write(tmp_path / "train.jsonl", first, "", row)
    with pytest.raises(ValueError) as error:
        prepare_data(source, tmp_path / "out.jsonl", keys)
    assert f"train.jsonl:3: {message}" in str(error.value)
    assert not (tmp_path / "out.jsonl").exists()


def test_no_input_and_no_rows_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["--input", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    assert main(["prepare", "data", *arguments]) == 1
    assert "none.jsonl: cannot be read: No such file or directory" in capsys.readouterr().err
    with pytest.raises(ValueError, match="got no rows"):
        prepare_data(write(tmp_path / "empty.jsonl", ""), tmp_path / "out.jsonl", GSM8K)
    with pytest.raises(ValueError, match="got the input file"):
        prepare_data(tmp_path / "empty.jsonl", tmp_path / "empty.jsonl", GSM8K)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer().save_pretrained(directory)
    return directory


def test_a_model_has_the_tokenizers_vocabulary_rounded_up(tokenizer: Path, tmp_path: Path):
    count = prepare_model(tokenizer, tmp_path / "model", ModelSizes(hidden=32, head_dim=8, ffn=64))
    spec = ModelSpec.from_hf(tmp_path / "model")
    assert (spec.vocab_size, spec.hidden_size, spec.head_dim, spec.tied) == (128, 32, 8, True)
    assert spec.eos_token_ids == (0,)
    with safe_open(tmp_path / "model/model.safetensors", "pt") as file:
        sizes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    assert sum(rows * (rest[0] if rest else 1) for rows, *rest in sizes) == count
    assert (tmp_path / "model/tokenizer.json").is_file()


def test_the_seed_decides_the_weights(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        sizes = ["--hidden", "32", "--head-dim", "8", "--ffn", "64", "--untied", "--vocab-size", "20"]
        arguments = ["--tokenizer", str(tokenizer), "--out", str(tmp_path / name), "--seed", seed, *sizes]
        assert main(["prepare", "model", *arguments]) == 0
    assert "randomly initialised" in capsys.readouterr().out
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c
    assert not ModelSpec.from_hf(tmp_path / "a").tied


def test_what_makes_no_model_is_refused(tokenizer: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="--heads: got 4, need a multiple of the 3 kv heads"):
        prepare_model(tokenizer, tmp_path / "model", ModelSizes(kv_heads=3))
    with pytest.raises(ValueError, match="--vocab-size: got 7, need at least the tokenizer's 20 entries"):
        prepare_model(tokenizer, tmp_path / "model", ModelSizes(vocabulary=7))
    with pytest.raises(ValueError, match="no such directory"):
        prepare_model(tmp_path / "nothing", tmp_path / "model", ModelSizes())
    write(tmp_path / "file", "x")
    (tmp_path / "full").mkdir()
    write(tmp_path / "full/x", "x")
    with pytest.raises(ValueError, match="existing directory"):
        prepare_model(tokenizer, tmp_path / "full", ModelSizes())
    assert not (tmp_path / "model").exists()
