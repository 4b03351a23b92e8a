"""The demo task: right arithmetic, disjoint splits, files that are complete and the same every time."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from asyppo_megatron.config import RewardConfig
from asyppo_megatron.demo import prepare, task
from asyppo_megatron.demo.prepare import prepare_demo
from asyppo_megatron.demo.task import Chain
from asyppo_megatron.rewards import build_verifier
from asyppo_megatron.rollout.dataset import load_problems
from asyppo_megatron.rollout.tokenizer import decode, find_stop_tokens, load_tokenizer


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return prepare_demo(tmp_path_factory.mktemp("demo") / "files")


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_chain_is_worked_left_to_right_modulo_ten():
    chain = Chain(7, (("+", 5), ("*", 3), ("-", 8)))
    assert chain.prompt == "^7+5*3-8="
    assert chain.step_by_step == "7+5=2;2*3=6;6-8=8;#8$"
    assert (chain.direct, chain.answer) == ("#8$", "8")


def test_chains_are_distinct_and_depend_on_the_seed_alone():
    chains = task.sample_chains(2000, seed=3)
    assert len({c.prompt for c in chains}) == 2000
    assert task.sample_chains(500, seed=3) == chains[:500]
    assert task.sample_chains(500, seed=4) != chains[:500]
    sizes = Counter(len(c.rest) for c in chains)
    assert set(sizes) == set(task.OPERATIONS) and min(sizes.values()) > 500
    lengths = [len(c.prompt) + len(c.step_by_step) for c in chains]
    assert 36 < sum(lengths) / len(lengths) < 42 and max(lengths) == 46


def test_the_splits_share_no_prompt(files):
    supervised = {r["prompt"] for r in rows(files.supervised)}
    train, held_out = ({r["problem"] for r in rows(p)} for p in (files.train, files.held_out))
    assert (len(supervised), len(train), len(held_out)) == (
        prepare.NUM_SUPERVISED,
        prepare.NUM_TRAIN,
        prepare.NUM_HELD_OUT,
    )
    assert not held_out & (supervised | train) and not supervised & train
    assert files.overlap == 0


def test_most_supervised_examples_answer_directly_and_all_answer_right(files):
    examples = rows(files.supervised)
    assert sum(";" not in e["response"] for e in examples) == round(0.78 * len(examples))
    for example in examples[:500]:
        value, rest = int(example["prompt"][1]), example["prompt"][2:-1]
        for op, digit in zip(rest[::2], rest[1::2], strict=True):
            value = {"+": value + int(digit), "-": value - int(digit), "*": value * int(digit)}[op] % 10
        assert example["response"].endswith(f"#{value}$")


def test_the_reward_accepts_both_styles(files):
    verifier = build_verifier(RewardConfig(kind="exact"))
    tokenizer = load_tokenizer(files.tokenizer)
    chains = task.sample_chains(200, seed=9)
    for style in ("direct", "step_by_step"):
        texts = [decode(tokenizer, prepare_ids(tokenizer, getattr(c, style))) for c in chains]
        verdicts = verifier.score_many([(t, c.answer) for t, c in zip(texts, chains, strict=True)])
        assert all(v.reward == 1 for v in verdicts)
    wrong = verifier.score_many([("7+5=2;#3", "2"), ("7+5=2;", "2"), ("", "2")])
    assert all(v.reward == 0 and v.status == "ok" for v in wrong)


def prepare_ids(tokenizer, text):
    return np.array(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)


def test_the_tokenizer_makes_one_token_a_character(files):
    tokenizer = load_tokenizer(files.tokenizer)
    assert tokenizer("^7+5*3-8=0;#6$")["input_ids"] == [task.VOCABULARY.index(c) for c in "^7+5*3-8=0;#6$"]
    assert tokenizer.decode(tokenizer("7+5=2;#2")["input_ids"]) == "7+5=2;#2"
    assert tokenizer("x")["input_ids"] == [task.VOCABULARY.index("?")]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0 and len(tokenizer) == 20
    assert find_stop_tokens(tokenizer, files.actor) == (0,)


def test_the_files_fit_the_dataset_reader(files):
    tokenizer = load_tokenizer(files.tokenizer)
    problems = load_problems(files.train, tokenizer, chat_template="none", system_prompt="", max_prompt_tokens=13)
    assert len(problems.items) == prepare.NUM_TRAIN and problems.skipped == 0


def test_a_critic_is_a_quarter_of_the_actor(files):
    actor, critic = (
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(p)).num_parameters()
        for p in (files.actor, files.critic)
    )
    assert actor == 308_784 and 0.2 < critic / actor < 0.3


def test_preparing_again_changes_nothing_and_another_seed_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "NUM_SUPERVISED", 50)
    monkeypatch.setattr(prepare, "NUM_TRAIN", 20)
    first = prepare_demo(tmp_path / "demo")
    (first.directory / "base").mkdir()  # what others keep there stays
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in first.directory.rglob("*") if p.is_file()}
    assert prepare_demo(tmp_path / "demo") == first
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in before} == before
    (first.directory / "demo.json").unlink()  # as an interrupted run leaves it
    prepare_demo(tmp_path / "demo")
    assert {p: p.read_bytes() for p in before} == {p: content for p, (_, content) in before.items()}
    prepare_demo(tmp_path / "demo", seed=1)
    assert first.train.read_bytes() != before[first.train][1]
    assert (first.directory / "base").is_dir()
    assert [p.name for p in tmp_path.iterdir()] == ["demo"]
