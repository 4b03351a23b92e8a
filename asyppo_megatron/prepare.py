"""`asyppo prepare`: a user's data and tokenizer into what a run reads.

`prepare_data` turns common JSONL (GSM8K's {question, answer: "... #### 18"} for instance) into {id, problem, answer};
`prepare_model` writes a small randomly initialised Qwen3 around a given tokenizer, to try a run out without a download.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asyppo_megatron.convert.atomic import atomic_directory, check_target
from asyppo_megatron.rollout.dataset import MAX_ERRORS_SHOWN, MAX_LINE_BYTES, numbered_lines, read_rows
from asyppo_megatron.rollout.tokenizer import load_tokenizer

GSM8K_MARKER = "####"
VOCABULARY_MULTIPLE = 128  # a vocabulary that tensor parallelism divides evenly, as published models have it


@dataclass(frozen=True)
class DataKeys:
    """Where a row keeps what.

    Attributes:
        problem, answer: keys that every row must have.
        id: key of the row's name; rows without it are numbered.
        answer_after: the answer is what follows the last of these; "" takes the whole value.
    """

    problem: str = "question"
    answer: str = "answer"
    id: str = "id"
    answer_after: str = ""


def prepare_data(source: Path, target: Path, keys: DataKeys) -> int:
    """Write `target` with a row {id, problem, answer} for every row of `source`; the number of rows.

    The file appears complete or not at all, and only after the reader that training uses has accepted it.

    Raises:
        ValueError: with file and line number of the first rows that are wrong.
    """
    if target.exists() and source.exists() and target.samefile(source):
        raise ValueError(f"--out: got the input file {source}, need another one")
    rows: list[dict[str, str]] = []
    errors: list[str] = []
    lines_by_id: dict[str, int] = {}
    for number, row in _objects(source):
        found = row if isinstance(row, str) else _convert(row, keys, f"{source.stem}-{len(rows)}")
        if isinstance(found, str):
            errors.append(f"{source}:{number}: {found}")
        elif found["id"] in lines_by_id:
            errors.append(f"{source}:{number}: id {found['id']!r} is that of line {lines_by_id[found['id']]}")
        else:
            lines_by_id[found["id"]] = number
            rows.append(found)
        if len(errors) >= MAX_ERRORS_SHOWN:
            break
    if errors:
        raise ValueError("\n".join(errors))
    if not rows:
        raise ValueError(f"{source}: got no rows, need JSON lines with {keys.problem!r} and {keys.answer!r}")
    _write_atomically(target, rows)
    return len(rows)


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Rows of a JSONL file with their line numbers; a sentence where a line is no object."""
    try:
        for number, line in numbered_lines(path):
            if len(line) > MAX_LINE_BYTES:
                yield number, f"line of more than {MAX_LINE_BYTES} bytes, need a shorter one"
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as e:
                yield number, f"is not JSON: {e}"
                continue
            yield number, row if isinstance(row, dict) else f"got a JSON {type(row).__name__}, need an object"
    except OSError as e:
        raise ValueError(f"{path}: cannot be read: {e.strerror}; give --input a JSONL file") from e


def _convert(row: dict[str, Any], keys: DataKeys, default_id: str) -> dict[str, str] | str:
    """The row as {id, problem, answer}, or what is wrong with it."""
    values: dict[str, str] = {}
    for name, key in (("problem", keys.problem), ("answer", keys.answer), ("id", keys.id)):
        value = row.get(key, default_id if name == "id" else None)
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)
        if value is None and key not in row:
            return f"got no key {key!r}, need one; the row has {sorted(row)} (--{name}-key chooses another)"
        if not isinstance(value, str) or not value.strip():
            return f"{key}: got {value!r}, need a non-empty string"
        values[name] = value.strip()
    marker, answer = keys.answer_after, values["answer"]
    if not marker and GSM8K_MARKER in answer:
        return f"{keys.answer}: got a solution with {GSM8K_MARKER!r} in it, need an answer; add --answer-after '####'"
    if marker:
        _, found, after = answer.rpartition(marker)
        if not found:
            return f"{keys.answer}: got no {marker!r} in {answer[:60]!r}, need one before the answer"
        values["answer"] = after.strip()
        if not values["answer"]:
            return f"{keys.answer}: got nothing after {marker!r}, need the answer there"
    return {name: values[name] for name in ("id", "problem", "answer")}


def _write_atomically(target: Path, rows: list[dict[str, str]]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part-{os.getpid()}")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        read_rows(part)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a small Qwen3.

    Attributes:
        vocabulary: embedding rows; None rounds the tokenizer's entries up to a multiple of 128.
        tied: the output layer shares the embedding.
    """

    hidden: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    ffn: int = 256
    positions: int = 4096
    vocabulary: int | None = None
    tied: bool = True

    def errors(self) -> list[str]:
        """What keeps these sizes from making a model; empty when nothing does."""
        positive = ("hidden", "layers", "heads", "kv_heads", "head_dim", "ffn", "positions")
        given = {f"--{name.replace('_', '-')}": getattr(self, name) for name in positive}
        found = [f"{name}: got {value}, need >= 1" for name, value in given.items() if value < 1]
        if not found and self.heads % self.kv_heads:
            found.append(f"--heads: got {self.heads}, need a multiple of the {self.kv_heads} kv heads")
        if self.head_dim % 2:
            found.append(f"--head-dim: got {self.head_dim}, need an even number (rotary embedding turns pairs)")
        return found


def prepare_model(tokenizer_dir: Path, target: Path, sizes: ModelSizes, *, seed: int = 0, force: bool = False) -> int:
    """Write a randomly initialised Qwen3 with its tokenizer as a Hugging Face directory; its number of parameters.

    Raises:
        ValueError: sizes that fit nothing, an unreadable tokenizer, a target that exists (without `force`).
    """
    check_target(target, force)
    tokenizer = load_tokenizer(tokenizer_dir)
    entries = len(tokenizer)
    rows = sizes.vocabulary or -(-entries // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    errors = sizes.errors()
    if rows < entries:
        errors.append(f"--vocab-size: got {rows}, need at least the tokenizer's {entries} entries")
    if tokenizer.eos_token_id is None:
        errors.append(f"{tokenizer_dir}: got a tokenizer without an end-of-sequence token, need one to end responses")
    if errors:
        raise ValueError("\n".join(errors))

    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    config = Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=rows,
        hidden_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        intermediate_size=sizes.ffn,
        max_position_embeddings=sizes.positions,
        tie_word_embeddings=sizes.tied,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    with atomic_directory(target, force=force) as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    return sum(p.numel() for p in model.parameters())
