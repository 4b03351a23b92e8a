"""Problems from JSONL, tokenised once, and the cursor that walks them in an order that survives a resume."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

log = logging.getLogger(__name__)

MAX_LINE_BYTES = 1 << 20
MAX_ERRORS_SHOWN = 10


class Row(NamedTuple):
    """One line of a dataset; `extra` holds the keys that are not named here."""

    id: str
    problem: str
    answer: str
    extra: Mapping[str, Any]


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        id: within its source.
        text: of the problem.
        answer: the reference answer; "" where the row has tests instead.
        prompt_tokens: i32 [P], ready for the policy (template and system prompt applied).
        extra: the row's other keys, for rewards that read them.
        source: name of the set it comes from.
        rewards: names of the rewards that score its responses; (): all.
    """

    id: str
    text: str
    answer: str
    prompt_tokens: np.ndarray
    extra: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    rewards: tuple[str, ...] = ()


@dataclass(frozen=True)
class Problems:
    """A dataset.

    Attributes:
        items: the problems whose prompt fits.
        skipped: problems left out because their prompt is too long.
        fingerprint: hash of everything a rollout depends on: ids, answers and prompt tokens in order.
    """

    items: tuple[Problem, ...]
    skipped: int
    fingerprint: str


def load_problems(
    path: Path,
    tokenizer: Any,
    *,
    chat_template: str,
    system_prompt: str,
    max_prompt_tokens: int,
    limit: int | None = None,
    source: str = "",
    rewards: tuple[str, ...] = (),
    check: Callable[[Row], str] | None = None,
) -> Problems:
    """Read, validate and tokenise a JSONL file of {id, problem, answer}; other keys are kept for rewards.

    Args:
        path: the file.
        tokenizer: a Hugging Face tokenizer.
        chat_template: "system" (chat template with a system prompt) or "none" (the text as it is).
        system_prompt: for "system".
        max_prompt_tokens: longer prompts are skipped and counted.
        limit: first rows only.
        source, rewards: of every problem.
        check: what rewards find wrong with a row, empty for nothing.

    Raises:
        ValueError: with file and line number of the rows that are wrong.
    """
    rows = read_rows(path, limit, check)
    prompts = _encode([row.problem for row in rows], tokenizer, chat_template, system_prompt)
    items = tuple(
        Problem(row.id, row.problem, row.answer, np.array(tokens, dtype=np.int32), row.extra, source, rewards)
        for row, tokens in zip(rows, prompts, strict=True)
        if 0 < len(tokens) <= max_prompt_tokens
    )
    skipped = len(rows) - len(items)
    if skipped:
        log.warning("%s: skipped %d of %d prompts, longer than %d tokens", path, skipped, len(rows), max_prompt_tokens)
    if not items:
        raise ValueError(
            f"{path}: got {len(rows)} problems, none with a prompt of <= {max_prompt_tokens} tokens; "
            "raise rollout.max_prompt_tokens"
        )
    return Problems(items, skipped, _fingerprint(items))


def read_rows(path: Path, limit: int | None = None, check: Callable[[Row], str] | None = None) -> list[Row]:
    """Validated rows of a JSONL file.

    Args:
        path: the file.
        limit: first rows only.
        check: what rewards find wrong with a row, empty for nothing.

    Raises:
        ValueError: with file and line number of the first rows that are wrong.
    """
    rows: list[Row] = []
    errors: list[str] = []
    seen: dict[str, int] = {}
    try:
        for number, line in numbered_lines(path):
            if limit is not None and len(rows) >= limit:
                break
            parsed = _parse(line)
            if isinstance(parsed, str):
                errors.append(f"{path}:{number}: {parsed}")
            elif parsed.id in seen:
                errors.append(f"{path}:{number}: id {parsed.id!r} is that of line {seen[parsed.id]}, need distinct ids")
            elif check is not None and (wrong := check(parsed)):
                errors.append(f"{path}:{number}: {wrong}")
            else:
                seen[parsed.id] = number
                rows.append(parsed)
            if len(errors) >= MAX_ERRORS_SHOWN:
                break
    except OSError as e:
        raise ValueError(f"{path}: cannot be read: {e.strerror}") from e
    if errors:
        raise ValueError("\n".join(errors))
    if not rows:
        raise ValueError(f"{path}: got no problems, need lines of {{id, problem, answer}}")
    return rows


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Non-empty lines with their numbers; a longer line than allowed comes cut, one byte over the limit."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                rest = file.readline(MAX_LINE_BYTES)
                if not rest or rest.endswith(b"\n"):
                    break
            if line.strip():
                yield number, line


def _parse(line: bytes) -> Row | str:
    """The row, or what is wrong with the line. A row with tests needs no answer."""
    if len(line) > MAX_LINE_BYTES:
        return f"line of more than {MAX_LINE_BYTES} bytes, need a shorter one"
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as e:
        return f"is not JSON: {e}"
    if not isinstance(row, dict):
        return f"got a JSON {type(row).__name__}, need an object of id, problem, answer"
    values = []
    for key in ("id", "problem", "answer"):
        value = row.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)
        if key == "answer" and value is None and key not in row and "tests" in row:
            value = ""
        elif not isinstance(value, str) or not value.strip():
            return f"{key}: got {row.get(key)!r}, need a non-empty string" if key in row else f"{key}: missing"
        values.append(value)
    extra = {key: value for key, value in row.items() if key not in ("id", "problem", "answer")}
    return Row(values[0], values[1], values[2], extra)


def _encode(texts: Sequence[str], tokenizer: Any, chat_template: str, system_prompt: str) -> list[list[int]]:
    if chat_template == "none":
        return tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    if not tokenizer.chat_template:
        raise ValueError(
            "data.chat_template: got system, but the tokenizer has no chat template; "
            "set data.chat_template=none or data.tokenizer to an instruct model's"
        )
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    chats = [[*system, {"role": "user", "content": text}] for text in texts]
    rendered = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]


def _fingerprint(items: Sequence[Problem]) -> str:
    digest = hashlib.sha256()
    for problem in items:
        digest.update(json.dumps([problem.id, problem.answer]).encode())
        if problem.extra:
            digest.update(json.dumps(problem.extra, sort_keys=True).encode())
        digest.update(problem.prompt_tokens.tobytes())
    return digest.hexdigest()[:16]


class PromptCursor:
    """An endless walk over a dataset: every epoch a permutation of its own, keyed by (seed, epoch).

    Its state is the number of prompts taken so far, so a resumed run continues with the next one.
    """

    def __init__(self, problems: Problems, seed: int, shuffle: bool = True):
        self._problems, self._seed, self._shuffle = problems, seed, shuffle
        self._consumed = 0
        self._epoch: tuple[int, np.ndarray] | None = None

    def take(self, count: int) -> list[Problem]:
        """The next `count` problems."""
        items = self._problems.items
        taken = []
        for position in range(self._consumed, self._consumed + count):
            epoch, offset = divmod(position, len(items))
            taken.append(items[self._order(epoch)[offset]])
        self._consumed += count
        return taken

    @property
    def position(self) -> int:
        """Prompts taken so far, those of former epochs included."""
        return self._consumed

    def _order(self, epoch: int) -> np.ndarray:
        if self._epoch is None or self._epoch[0] != epoch:
            count = len(self._problems.items)
            order = np.random.default_rng([self._seed, epoch]).permutation(count) if self._shuffle else np.arange(count)
            self._epoch = (epoch, order)
        return self._epoch[1]

    def record(self, problems: Sequence[Problem], passes: Sequence[int], tries: Sequence[int]) -> None:
        """This walk does not look at results."""

    def statistics(self) -> dict[str, float]:
        return {}

    def results(self) -> dict[str, Any]:
        return {}

    def state(self) -> dict[str, Any]:
        return {"consumed": self._consumed, "fingerprint": self._problems.fingerprint}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            ValueError: the state belongs to another dataset.
        """
        if "fingerprint" not in state:
            raise ValueError("data.train: got one file, need data.sources (of the checkpoint); restore them")
        if state["fingerprint"] != self._problems.fingerprint:
            raise ValueError(
                f"data.train: got a dataset with fingerprint {self._problems.fingerprint}, need {state['fingerprint']} "
                "(that of the checkpoint); restore the file, tokenizer, template and rollout.max_prompt_tokens, "
                "or start in a new run_dir"
            )
        self._consumed = int(state["consumed"])
