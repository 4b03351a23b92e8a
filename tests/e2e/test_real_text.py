"""Real text end to end: GSM8K-format rows, a byte-level BPE tokenizer with a chat template, math-verify, all roles."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from asyppo_megatron.config import PAPER_SYSTEM_PROMPT, EvalSetConfig, load_config
from asyppo_megatron.prepare import DataKeys, ModelSizes, prepare_data, prepare_model
from asyppo_megatron.rollout import journal
from asyppo_megatron.rollout.evaluate_model import evaluate_model
from asyppo_megatron.rollout.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "model_configs/runs/gsm8k_tiny.yaml"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CRITIC = ModelSizes(hidden=64, heads=2, kv_heads=1, head_dim=32, ffn=128)


def gsm8k_rows() -> list[dict[str, str]]:
    """A handful of problems in GSM8K's form: a worked solution that ends in `#### answer`."""
    names, things = ("Ada", "Ben", "Chloe", "Dov", "Emi", "Femi"), ("apples", "stamps", "marbles")
    rows = []
    for i, name in enumerate(names):
        boxes, each, given = 3 + i, 12 * (i + 1), 2 * i + 1
        thing, left = things[i % 3], (3 + i) * 12 * (i + 1) - (2 * i + 1)
        question = f"{name} has {boxes} boxes of {each} {thing} each and gives {given} away. How many {thing} are left?"
        solution = f"There are {boxes}*{each} = {boxes * each} {thing}.\nSo {boxes * each}-{given} = {left} are left."
        rows.append({"question": question, "answer": f"{solution}\n#### {left:,}"})
    return rows


def train_tokenizer(texts: list[str], directory: Path) -> None:
    """A byte-level BPE tokenizer of 512 entries with ChatML's special tokens."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts * 4, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )
    wrapped.save_pretrained(directory)


def train(directory: Path, *overrides: str) -> list[dict]:
    """Run the recipe with its files in `directory`; the metrics rows."""
    settings = [
        f"run_dir={directory / 'run'}",
        f"data.train={directory / 'train.jsonl'}",
        f"actor.model={directory / 'actor'}",
        f"critics.*.model={directory / 'critic'}",
        *overrides,
    ]
    command = [sys.executable, "-m", "asyppo_megatron", "train", str(CONFIG), *settings]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in (directory / "run/metrics.jsonl").read_text().splitlines()]


def check_rows(rows: list[dict], steps: int) -> None:
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    for row in rows:
        for name in ("loss/actor", "grad_norm/actor", "entropy", "loss/critic_0", "loss/critic_1", "value_std"):
            assert math.isfinite(row[name]), name
        assert row["reward_status/ok"] == 16
        assert row["updates/actor"] == row["updates/critic_0"] == row["updates/critic_1"] == 1
        assert row["mismatch_max"] < 1e-4  # the engine and the trainer score the same weights alike


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """Two steps on the test's own problems and tokenizer."""
    directory = tmp_path_factory.mktemp("real-text")
    source = directory / "gsm8k.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in gsm8k_rows()))
    assert prepare_data(source, directory / "train.jsonl", DataKeys(answer_after="####")) == 6
    texts = [text for row in gsm8k_rows() for text in row.values()]
    train_tokenizer([*texts, PAPER_SYSTEM_PROMPT, "system user assistant"], directory / "tokenizer")
    prepare_model(directory / "tokenizer", directory / "actor", ModelSizes())
    prepare_model(directory / "tokenizer", directory / "critic", CRITIC, seed=1)
    overrides = ["num_steps=2", "rollout.max_response_tokens=24", "checkpoint={every: 0, at_end: false}"]
    return directory, train(directory, *overrides)


def test_two_steps_on_gsm8k_format_rows(finished_run):
    _, rows = finished_run
    check_rows(rows, steps=2)


def test_prompts_carry_the_template_and_the_system_prompt(finished_run):
    directory, _ = finished_run
    arrays, _ = journal.load_step(directory / "run", journal.journalled_steps(directory / "run")[-1])
    tokenizer = load_tokenizer(directory / "actor")
    first = arrays["tokens"][: arrays["cu_seqlens"][1]]
    end_of_prompt = int(np.argmax(arrays["loss_mask"])) + 1
    prompt = tokenizer.decode(first[:end_of_prompt].tolist())
    assert prompt.startswith(f"<|im_start|>system\n{PAPER_SYSTEM_PROMPT}<|im_end|>")
    assert prompt.endswith("are left?<|im_end|>\n<|im_start|>assistant\n")


def test_the_exported_actor_is_evaluated_without_a_run_directory(finished_run, tmp_path: Path):
    directory, _ = finished_run
    config = load_config(CONFIG, [f"run_dir={tmp_path / 'new'}", "rollout.max_response_tokens=16", "eval.samples=2"])
    sets = (EvalSetConfig(name="six", path=directory / "train.jsonl"),)
    config = config.model_copy(update={"data": config.data.model_copy(update={"eval": sets})})
    (result,) = evaluate_model(config, directory / "run/hf/actor")
    assert (result.num_problems, result.k, result.reward_status) == (6, 2, {"ok": 18})
    rows = [json.loads(line) for line in (tmp_path / "new/eval/actor/six.jsonl").read_text().splitlines()]
    assert [row["answer"] for row in rows][:2] == ["35", "93"]
    assert sum(row["greedy"] for row in rows) / 6 == result.greedy


def test_a_step_on_the_users_data_and_tokenizer(tmp_path: Path):
    data, tokenizer = (os.environ.get(name) for name in ("ASYPPO_TEST_DATA", "ASYPPO_TEST_TOKENIZER"))
    if not data or not tokenizer:
        pytest.skip("ASYPPO_TEST_DATA (JSONL of id, problem, answer) and ASYPPO_TEST_TOKENIZER are not set")
    prepare_data(Path(data), tmp_path / "train.jsonl", DataKeys(problem="problem"))
    prepare_model(Path(tokenizer), tmp_path / "actor", ModelSizes())
    prepare_model(Path(tokenizer), tmp_path / "critic", CRITIC, seed=1)
    rows = train(tmp_path, "num_steps=1", "checkpoint.at_end=false", "checkpoint.export_hf=false")
    check_rows(rows, steps=1)
    assert rows[0]["memory/peak_gb"] < 1.2
