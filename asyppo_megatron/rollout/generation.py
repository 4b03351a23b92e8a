"""One step's rollouts: prompts to requests, responses to trajectories, statistics for the journal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from asyppo_megatron.config import FilteringConfig, RolloutConfig
from asyppo_megatron.rollout.buffer import Group
from asyppo_megatron.rollout.engine import GenerationRequest
from asyppo_megatron.rollout.filtering import overlong_penalty
from asyppo_megatron.rollout.reward_statistics import is_correct, reward_statistics
from asyppo_megatron.rollout.scoring import stable_seed
from asyppo_megatron.types import Trajectory


def group_requests(
    groups: Sequence[Group], config: RolloutConfig, stop_token_ids: tuple[int, ...], *, seed: int
) -> list[GenerationRequest]:
    """G requests a group, in (group, sample) order; each with a seed of its own."""
    requests = []
    for number, group in enumerate(groups):
        # The place tells two visits of one problem apart, also where an epoch ends within a step.
        step, place = divmod(group.position, config.prompts_per_step)
        for sample in range(config.responses_per_prompt):
            requests.append(
                GenerationRequest(
                    index=number * config.responses_per_prompt + sample,
                    prompt_tokens=group.problem.prompt_tokens,
                    max_new_tokens=config.max_response_tokens,
                    temperature=config.temperature,
                    top_p=config.top_p,
                    top_k=config.top_k,
                    stop_token_ids=stop_token_ids,
                    seed=stable_seed(seed, step, place, group.problem.id, sample),
                )
            )
    return requests


def step_trajectories(groups: Sequence[Group]) -> list[Trajectory]:
    """Trajectories in (group, sample) order, whatever order they finished in."""
    return [
        Trajectory(
            prompt_id=group.problem.id,
            group=number,
            sample=sample,
            prompt_tokens=group.problem.prompt_tokens,
            response_tokens=r.completion.tokens,
            rollout_logprobs=r.completion.logprobs,
            reward=r.verdict.reward,
            finish_reason=r.completion.finish_reason,
            policy_version=r.completion.policy_version,
            kept_mass=r.completion.kept_mass,
            reward_status=r.verdict.status,
            version_spans=r.completion.version_spans,
            token_rewards=r.verdict.token_rewards,
        )
        for number, group in enumerate(groups)
        for sample, r in enumerate(group.responses)
    ]


def penalised(
    trajectories: Sequence[Trajectory], max_tokens: int, config: FilteringConfig
) -> tuple[list[Trajectory], dict[str, float]]:
    """Trajectories whose rewards bear the penalty on length, and what it came to."""
    if config.overlong_fraction == 0:
        return list(trajectories), {}
    penalties = [overlong_penalty(len(t.response_tokens), max_tokens, config) for t in trajectories]
    changed = [replace(t, reward=t.reward + p) for t, p in zip(trajectories, penalties, strict=True)]
    return changed, {
        "reward": sum(t.reward for t in changed) / len(changed),
        "overlong_penalty": sum(penalties) / len(penalties),
        "overlong_rate": sum(p < 0 for p in penalties) / len(penalties),
    }


def step_statistics(trajectories: Sequence[Trajectory], groups: Sequence[Group]) -> dict[str, Any]:
    """What the journal's manifest says about a step; lengths in tokens, times in seconds."""
    count = len(trajectories)
    lengths = [len(t.response_tokens) for t in trajectories]
    waves = {g.wave: g for g in groups}.values()
    responses = [r for g in groups for r in g.responses]
    masses = [t.kept_mass for t in trajectories if not math.isnan(t.kept_mass)]
    return {
        "reward": sum(t.reward for t in trajectories) / count,
        "accuracy": sum(map(is_correct, responses)) / count,
        "response_length": sum(lengths) / count,
        "response_length_max": max(lengths),
        "prompt_length": sum(len(t.prompt_tokens) for t in trajectories) / count,
        "truncation_rate": sum(t.finish_reason == "length" for t in trajectories) / count,
        **({"kept_mass": sum(masses) / len(masses)} if masses else {}),
        "reward_status": dict(Counter(t.reward_status for t in trajectories)),
        "generated_tokens": sum(lengths),
        "generate_seconds": sum(g.generate_s for g in waves),
        "verify_seconds": sum(g.verify_s for g in waves),
    } | reward_statistics(responses, [g.problem for g in groups for _ in g.responses])


def staleness_statistics(trajectories: Sequence[Trajectory], step: int) -> dict[str, float]:
    """Age of the weights that generated a step's tokens, in updates, and how many responses met an update."""
    ages, tokens = 0, 0
    for t in trajectories:
        spans = t.version_spans or ((0, t.policy_version),)
        ends = [first for first, _ in spans[1:]] + [len(t.response_tokens)]
        ages += sum((end - first) * (step - version) for (first, version), end in zip(spans, ends, strict=True))
        tokens += len(t.response_tokens)
    return {
        "staleness/mean": ages / max(tokens, 1),
        "staleness/max": max(step - t.policy_version for t in trajectories),
        "rollout/carried_over": sum(bool(t.version_spans) for t in trajectories),
    }


def sample_rows(groups: Sequence[Group], trajectories: Sequence[Trajectory], count: int) -> list[dict[str, Any]]:
    """Text of the first trajectories, for a reader."""
    return [
        {
            "id": t.prompt_id,
            "sample": t.sample,
            "problem": groups[t.group].problem.text,
            "answer": groups[t.group].problem.answer,
            "response": groups[t.group].responses[t.sample].text,
            "reward": t.reward,
            "reward_status": t.reward_status,
            "finish_reason": t.finish_reason,
        }
        for t in trajectories[:count]
    ]
