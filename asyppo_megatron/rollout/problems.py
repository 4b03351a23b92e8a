"""The problems of a run: every source and evaluation set as the configuration wants them read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from asyppo_megatron.config import Config, EvalSetConfig, SourceConfig
from asyppo_megatron.rewards.code import row_error
from asyppo_megatron.rollout.dataset import Problem, Problems, PromptCursor, Row, load_problems
from asyppo_megatron.rollout.mixture import PromptMixture


class Prompts(Protocol):
    """Where the next prompts come from: one file, or a mixture."""

    def take(self, count: int) -> list[Problem]: ...

    def record(self, problems: Sequence[Problem], passes: Sequence[int], tries: Sequence[int]) -> None: ...

    def statistics(self) -> dict[str, float]: ...

    def state(self) -> dict[str, Any]: ...

    def results(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...


def row_check(config: Config, item: SourceConfig | EvalSetConfig) -> Callable[[Row], str]:
    """What an item's rewards ask of its rows beyond a problem and an answer."""
    chosen = [r for r in config.all_rewards if not item.rewards or r.label in item.rewards]
    if not any(r.kind == "code" for r in chosen):
        return _answer_error
    if all(r.kind in ("code", "model", "function") for r in chosen):
        return lambda row: row_error(row.extra)
    return lambda row: row_error(row.extra) or _answer_error(row)


def _answer_error(row: Row) -> str:
    return "" if row.answer else "answer: missing"


def build_train_problems(config: Config, tokenizer: Any) -> dict[str, Problems]:
    """Training problems by source."""
    return {s.name: _build(config, tokenizer, s, s.path, None, s.name) for s in config.data.all_sources}


def build_eval_problems(config: Config, tokenizer: Any, item: EvalSetConfig) -> Problems:
    return _build(config, tokenizer, item, item.path, item.limit, "")


def build_prompts(config: Config, problems: Mapping[str, Problems]) -> Prompts:
    """The walk over the training problems."""
    if config.data.is_mixed:
        return PromptMixture(problems, config.data, config.seed)
    (only,) = problems.values()
    return PromptCursor(only, config.seed, config.data.shuffle)


def _build(
    config: Config, tokenizer: Any, item: SourceConfig | EvalSetConfig, path: Path, limit: int | None, source: str
) -> Problems:
    data = config.data
    return load_problems(
        path,
        tokenizer,
        chat_template=item.chat_template or data.chat_template,
        system_prompt=data.system_prompt if item.system_prompt is None else item.system_prompt,
        max_prompt_tokens=config.rollout.max_prompt_tokens,
        limit=limit,
        source=source,
        rewards=item.rewards,
        check=row_check(config, item),
    )
