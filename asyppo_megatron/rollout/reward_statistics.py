"""What a step's rewards looked like: each reward and each source apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from asyppo_megatron.rollout.dataset import Problem
from asyppo_megatron.rollout.scoring import Scored

CORRECT = 0.5  # a response is correct where its first reward is above this


def is_correct(scored: Scored) -> bool:
    return scored.verdict.primary > CORRECT


def passes_and_tries(groups: Sequence[Sequence[Scored]]) -> tuple[list[int], list[int]]:
    """Correct and all responses of each group, in order."""
    return [sum(map(is_correct, g)) for g in groups], [len(g) for g in groups]


def reward_statistics(responses: Sequence[Scored], problems: Sequence[Problem]) -> dict[str, Any]:
    """For the log, where there is more than one reward or source or a dense reward.

    Args:
        responses: of the step.
        problems: of each response.

    Returns:
        reward/<name>/mean, /std, /count and /<status> (responses by cause of a fallback 0) of each reward, raw, without
        its weight; reward/dense, the mean over responses of their tokens' rewards, and reward/dense_tokens, the mean
        number of tokens that have one; source/<name>/responses, /reward and /accuracy.
    """
    found: dict[str, Any] = {}
    names = list(dict.fromkeys(n for r in responses for n in r.verdict.scores))
    dense = [r.verdict.token_rewards for r in responses if r.verdict.token_rewards is not None]
    if len(names) > 1 or dense:
        for name in names:
            scores = np.array([r.verdict.scores[name] for r in responses if name in r.verdict.scores])
            found |= {
                f"reward/{name}/mean": float(scores.mean()),
                f"reward/{name}/std": float(scores.std()),
                f"reward/{name}/count": len(scores),
            }
            causes = Counter(r.verdict.statuses[name] for r in responses if name in r.verdict.statuses)
            found |= {f"reward/{name}/{cause}": count for cause, count in causes.items() if cause != "ok"}
    if dense:
        found["reward/dense"] = float(np.mean([d.sum(dtype=np.float64) for d in dense]))
        found["reward/dense_tokens"] = float(np.mean([np.count_nonzero(d) for d in dense]))
    return found | _by_source(responses, problems)


def _by_source(responses: Sequence[Scored], problems: Sequence[Problem]) -> dict[str, Any]:
    sources = list(dict.fromkeys(p.source for p in problems))
    if len(sources) < 2:
        return {}
    found: dict[str, Any] = {}
    for name in sources:
        members = [r for r, p in zip(responses, problems, strict=True) if p.source == name]
        found |= {
            f"source/{name}/responses": len(members),
            f"source/{name}/reward": sum(r.verdict.reward for r in members) / len(members),
            f"source/{name}/accuracy": sum(map(is_correct, members)) / len(members),
        }
    return found
