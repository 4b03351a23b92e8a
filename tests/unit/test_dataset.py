"""Datasets: what is refused and how, templates, skipped prompts, and the cursor's order."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from asyppo_megatron.demo.prepare import build_tokenizer
from asyppo_megatron.rollout import dataset
from asyppo_megatron.rollout.dataset import PromptCursor, load_problems, read_rows
from asyppo_megatron.rollout.tokenizer import decode, find_stop_tokens, load_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ '!' if m['role'] == 'system' else '^' }}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def write(path: Path, rows: list) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def row(name: object, problem: object = "^1+1=", answer: object = "2", **more) -> dict:
    return {"id": name, "problem": problem, "answer": answer, **more}


def load(path: Path, tokenizer, **settings):
    settings = {"chat_template": "none", "system_prompt": "", "max_prompt_tokens": 100, **settings}
    return load_problems(path, tokenizer, **settings)


def test_rows_are_read_with_numbers_as_text_and_other_keys_ignored(tmp_path):
    path = write(tmp_path / "a.jsonl", [row("a", source="x"), "", row(7, answer=4.5)])
    assert read_rows(path) == [("a", "^1+1=", "2", {"source": "x"}), ("7", "^1+1=", "4.5", {})]
    assert len(read_rows(path, limit=1)) == 1


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{not json", r"a.jsonl:2: is not JSON"),
        ('["id"]', r"a.jsonl:2: got a JSON list, need an object of id, problem, answer"),
        ({"id": "b", "problem": "^1="}, r"a.jsonl:2: answer: missing"),
        (row("b", answer="  "), r"a.jsonl:2: answer: got '  ', need a non-empty string"),
        (row("b", answer=None), r"a.jsonl:2: answer: got None, need a non-empty string"),
        (row("b", problem=["x"]), r"a.jsonl:2: problem: got \['x'\], need a non-empty string"),
        (row(""), r"a.jsonl:2: id: got '', need a non-empty string"),
        (row("a"), r"a.jsonl:2: id 'a' is that of line 1, need distinct ids"),
        ("[" * 100000, r"a.jsonl:2: is not JSON"),
    ],
)
def test_a_wrong_row_is_named_by_file_and_line(tmp_path, bad, message):
    path = write(tmp_path / "a.jsonl", [row("a"), bad, row("c")])
    with pytest.raises(ValueError, match=message):
        read_rows(path)


def test_all_wrong_rows_are_named_at_once_up_to_ten(tmp_path):
    path = write(tmp_path / "a.jsonl", [row("a"), "x", row("b", answer=""), "y"])
    with pytest.raises(ValueError) as error:
        read_rows(path)
    assert [line.split(": ")[0].rsplit(":")[-1] for line in str(error.value).splitlines()] == ["2", "3", "4"]
    write(path, ["x"] * 50)
    with pytest.raises(ValueError) as error:
        read_rows(path)
    assert len(str(error.value).splitlines()) == 10


def test_a_line_without_end_is_refused_without_reading_it_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "MAX_LINE_BYTES", 100)
    path = write(tmp_path / "a.jsonl", [row("a"), row("b", problem="x" * 1000), row("c", answer="")])
    with pytest.raises(ValueError, match=r"a.jsonl:2: line of more than 100 bytes(.|\n)*a.jsonl:3: answer"):
        read_rows(path)


def test_a_file_that_is_missing_or_empty_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="got no problems"):
        read_rows(write(tmp_path / "a.jsonl", [""]))


def test_plain_prompts_are_encoded_as_they_are(tmp_path, tokenizer):
    (problem,) = load(write(tmp_path / "a.jsonl", [row("a", "^1+2=")]), tokenizer).items
    assert tokenizer.convert_ids_to_tokens(problem.prompt_tokens.tolist()) == list("^1+2=")
    assert problem.prompt_tokens.dtype == "int32"


def test_the_system_template_frames_a_prompt(tmp_path):
    tokenizer = build_tokenizer()
    path = write(tmp_path / "a.jsonl", [row("a", "1+2")])
    with pytest.raises(ValueError, match="set data.chat_template=none"):
        load(path, tokenizer, chat_template="system", system_prompt="9")
    tokenizer.chat_template = TEMPLATE
    (problem,) = load(path, tokenizer, chat_template="system", system_prompt="9").items
    assert tokenizer.decode(problem.prompt_tokens.tolist()) == "!9^1+2="
    (problem,) = load(path, tokenizer, chat_template="system", system_prompt="").items
    assert tokenizer.decode(problem.prompt_tokens.tolist()) == "^1+2="


def test_prompts_that_are_too_long_are_skipped_and_counted(tmp_path, tokenizer, caplog):
    path = write(tmp_path / "a.jsonl", [row("a", "^1="), row("b", "^1+1+1="), row("c", "^2=")])
    problems = load(path, tokenizer, max_prompt_tokens=3)
    assert [p.id for p in problems.items] == ["a", "c"] and problems.skipped == 1
    assert "skipped 1 of 3 prompts, longer than 3 tokens" in caplog.text
    with pytest.raises(ValueError, match=r"none with a prompt of <= 2 tokens; raise rollout.max_prompt_tokens"):
        load(path, tokenizer, max_prompt_tokens=2)


def numbered(tmp_path: Path, tokenizer, count: int, name: str = "n.jsonl", **more):
    return load(write(tmp_path / name, [row(f"p{i}", **more) for i in range(count)]), tokenizer)


def ids(problems) -> list[str]:
    return [p.id for p in problems]


def test_every_epoch_visits_each_problem_once_in_an_order_of_its_own(tmp_path, tokenizer):
    problems = numbered(tmp_path, tokenizer, 20)
    cursor = PromptCursor(problems, seed=1)
    epochs = [ids(cursor.take(20)) for _ in range(3)]
    assert all(sorted(e) == sorted(ids(problems.items)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert ids(PromptCursor(problems, seed=2).take(20)) != epochs[0]
    assert ids(PromptCursor(problems, seed=1, shuffle=False).take(25)) == [f"p{i % 20}" for i in range(25)]


def test_the_cursor_goes_on_where_its_state_says(tmp_path, tokenizer):
    problems = numbered(tmp_path, tokenizer, 10)
    whole = ids(PromptCursor(problems, seed=3).take(40))
    cursor = PromptCursor(problems, seed=3)
    assert ids(cursor.take(17)) == whole[:17]
    state = json.loads(json.dumps(cursor.state()))
    resumed = PromptCursor(problems, seed=3)
    resumed.restore(state)
    assert [i for n in (3, 13, 7) for i in ids(resumed.take(n))] == whole[17:]


@pytest.mark.parametrize("change", [{"answer": "3"}, {"problem": "^2+2="}])
def test_the_cursor_refuses_a_dataset_that_changed(tmp_path, tokenizer, change):
    state = PromptCursor(numbered(tmp_path, tokenizer, 5), seed=0).state()
    with pytest.raises(ValueError, match=r"got a dataset with fingerprint .* need .* or start in a new run_dir"):
        PromptCursor(numbered(tmp_path, tokenizer, 5, "m.jsonl", **change), seed=0).restore(state)


def test_stop_tokens_come_from_tokenizer_model_and_configuration(tmp_path, tokenizer):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 5}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [6, 5]}))
    assert find_stop_tokens(tokenizer, tmp_path, (9,)) == (0, 5, 6, 9)
    assert find_stop_tokens(tokenizer, tmp_path / "none") == (0,)


def test_text_has_no_stop_token_and_survives_ids_beyond_the_vocabulary(tokenizer):
    tokens = [*tokenizer("#6$")["input_ids"], 31]
    assert decode(tokenizer, np.array(tokens, dtype=np.int32)) == "#6"


def test_a_tokenizer_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such directory"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
