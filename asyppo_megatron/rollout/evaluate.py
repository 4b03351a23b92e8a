"""Evaluation of a policy on a set of problems: greedy accuracy and avg@k, with every problem's result kept."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asyppo_megatron.config import EvalConfig
from asyppo_megatron.rollout.dataset import Problem, Problems
from asyppo_megatron.rollout.engine import GenerationRequest
from asyppo_megatron.rollout.scoring import Scored, Scorer, stable_seed


@dataclass(frozen=True)
class EvalResult:
    """Result on one set.

    Attributes:
        name: of the set.
        greedy: share of problems whose greedy response is correct; None when not asked for.
        avg_at_k: mean over problems of the share of its k samples that are correct; None when not asked for.
        k: samples a problem.
        num_problems: problems evaluated.
        num_skipped: problems left out because their prompt is too long.
        response_length: mean over all responses, tokens.
        truncation_rate: share of all responses that hit the length limit.
        reward_status: responses by status of their verdict.
        rows: one dict a problem: id, answer, greedy, response, finish_reason, samples.
    """

    name: str
    greedy: float | None
    avg_at_k: float | None
    k: int
    num_problems: int
    num_skipped: int
    response_length: float
    truncation_rate: float
    reward_status: dict[str, int]
    rows: list[dict[str, Any]]

    def summary(self) -> dict[str, Any]:
        """Everything but the rows."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "rows"}


def evaluate_set(
    scorer: Scorer,
    problems: Problems,
    name: str,
    config: EvalConfig,
    *,
    max_new_tokens: int,
    stop_token_ids: tuple[int, ...],
    seed: int,
) -> EvalResult:
    """Evaluate the weights that the scorer's engine holds.

    Args:
        scorer: engine, tokenizer and verifier.
        problems: the set.
        name: of the set; part of the samples' seeds.
        config: greedy or not, k, and how to sample.
        max_new_tokens: of a response, where the config names none.
        stop_token_ids: that end a response.
        seed: of the samples; the same at every step, so that two checkpoints meet the same random numbers.
    """
    if not config.greedy and not config.samples:
        raise ValueError("eval: got greedy false and samples 0, need one of them; set eval.samples or eval.greedy")
    limit = config.max_response_tokens or max_new_tokens
    requests: list[GenerationRequest] = []
    asked: list[Problem] = []
    for problem in problems.items:
        for number in range(0 if config.greedy else 1, config.samples + 1):
            requests.append(_request(problem, number, len(requests), config, limit, stop_token_ids, (seed, name)))
            asked.append(problem)
    responses = scorer.run(requests, asked).responses
    each = len(requests) // len(problems.items)
    rows = [
        _row(problem, responses[i * each : (i + 1) * each], config.greedy) for i, problem in enumerate(problems.items)
    ]
    return _result(name, config, problems, responses, rows)


def _request(
    problem: Problem,
    number: int,
    index: int,
    config: EvalConfig,
    limit: int,
    stop_token_ids: tuple[int, ...],
    key: tuple[object, ...],
) -> GenerationRequest:
    """Number 0 is the greedy response, 1..k are the samples."""
    greedy = number == 0
    return GenerationRequest(
        index=index,
        prompt_tokens=problem.prompt_tokens,
        max_new_tokens=limit,
        temperature=0.0 if greedy else config.temperature,
        top_p=1.0 if greedy else config.top_p,
        top_k=0 if greedy else config.top_k,
        stop_token_ids=stop_token_ids,
        seed=stable_seed("eval", *key, problem.id, number),
    )


def _row(problem: Problem, responses: Sequence[Scored], greedy: bool) -> dict[str, Any]:
    first = responses[0]
    return {
        "id": problem.id,
        "answer": problem.answer,
        "greedy": first.verdict.primary if greedy else None,
        "response": first.text,
        "finish_reason": first.completion.finish_reason,
        "samples": [s.verdict.primary for s in responses[1 if greedy else 0 :]],
    }


def _result(
    name: str, config: EvalConfig, problems: Problems, responses: Sequence[Scored], rows: list[dict[str, Any]]
) -> EvalResult:
    count = len(rows)
    return EvalResult(
        name=name,
        greedy=sum(r["greedy"] for r in rows) / count if config.greedy else None,
        avg_at_k=sum(sum(r["samples"]) / config.samples for r in rows) / count if config.samples else None,
        k=config.samples,
        num_problems=count,
        num_skipped=problems.skipped,
        response_length=sum(len(s.completion.tokens) for s in responses) / len(responses),
        truncation_rate=sum(s.completion.finish_reason == "length" for s in responses) / len(responses),
        reward_status=dict(Counter(s.verdict.status for s in responses)),
        rows=rows,
    )


def check_set_name(name: str) -> None:
    """A set's name becomes a file name."""
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name) or name.startswith("."):
        raise ValueError(f"data.eval.name: got {name!r}, need letters, digits, '_', '-', '.'; rename the set")


def write_rows(directory: Path, result: EvalResult) -> Path:
    """Per-problem results to `directory/<name>.jsonl`."""
    check_set_name(result.name)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{result.name}.jsonl"
    part = path.with_suffix(".jsonl.part")
    part.write_text("".join(json.dumps(row) + "\n" for row in result.rows))
    part.replace(path)
    return path
