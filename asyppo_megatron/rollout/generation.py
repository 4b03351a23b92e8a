"""One step's rollouts: prompts to requests, responses to trajectories, statistics for the journal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from asyppo_megatron.config import RolloutConfig
from asyppo_megatron.rollout.dataset import Problem
from asyppo_megatron.rollout.engine import GenerationRequest
from asyppo_megatron.rollout.reward_statistics import is_correct, reward_statistics
from asyppo_megatron.rollout.scoring import Scored, ScoredResponses, stable_seed
from asyppo_megatron.types import Trajectory


def step_requests(
    problems: Sequence[Problem], config: RolloutConfig, stop_token_ids: tuple[int, ...], *, seed: int, step: int
) -> list[GenerationRequest]:
    """G requests a problem, in (group, sample) order; each with a seed of its own."""
    return [
        GenerationRequest(
            index=group * config.responses_per_prompt + sample,
            prompt_tokens=problem.prompt_tokens,
            max_new_tokens=config.max_response_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            stop_token_ids=stop_token_ids,
            # The group tells two visits of one problem apart where an epoch ends within a step.
            seed=stable_seed(seed, step, group, problem.id, sample),
        )
        for group, problem in enumerate(problems)
        for sample in range(config.responses_per_prompt)
    ]


def step_trajectories(problems: Sequence[Problem], responses: Sequence[Scored], group_size: int) -> list[Trajectory]:
    """Trajectories in (group, sample) order, whatever order they finished in."""
    return [
        Trajectory(
            prompt_id=problems[i // group_size].id,
            group=i // group_size,
            sample=i % group_size,
            prompt_tokens=problems[i // group_size].prompt_tokens,
            response_tokens=r.completion.tokens,
            rollout_logprobs=r.completion.logprobs,
            reward=r.verdict.reward,
            finish_reason=r.completion.finish_reason,
            policy_version=r.completion.policy_version,
            kept_mass=r.completion.kept_mass,
            reward_status=r.verdict.status,
            token_rewards=r.verdict.token_rewards,
        )
        for i, r in enumerate(responses)
    ]


def step_statistics(
    trajectories: Sequence[Trajectory], scores: ScoredResponses, problems: Sequence[Problem]
) -> dict[str, Any]:
    """What the journal's manifest says about a step; lengths in tokens, times in seconds.

    Args:
        trajectories: of the step.
        scores: the responses they come from.
        problems: by group.
    """
    count = len(trajectories)
    lengths = [len(t.response_tokens) for t in trajectories]
    return {
        "reward": sum(t.reward for t in trajectories) / count,
        "accuracy": sum(map(is_correct, scores.responses)) / count,
        "response_length": sum(lengths) / count,
        "response_length_max": max(lengths),
        "prompt_length": sum(len(t.prompt_tokens) for t in trajectories) / count,
        "truncation_rate": sum(t.finish_reason == "length" for t in trajectories) / count,
        "kept_mass": sum(t.kept_mass for t in trajectories) / count,
        "reward_status": dict(Counter(t.reward_status for t in trajectories)),
        "generated_tokens": sum(lengths),
        "generate_seconds": scores.generate_s,
        "verify_seconds": scores.verify_s,
    } | reward_statistics(scores.responses, [problems[t.group] for t in trajectories])


def sample_rows(
    problems: Sequence[Problem], trajectories: Sequence[Trajectory], responses: Sequence[Scored], count: int
) -> list[dict[str, Any]]:
    """Text of the first trajectories, for a reader."""
    return [
        {
            "id": t.prompt_id,
            "sample": t.sample,
            "problem": problems[t.group].text,
            "answer": problems[t.group].answer,
            "response": r.text,
            "reward": t.reward,
            "reward_status": t.reward_status,
            "finish_reason": t.finish_reason,
        }
        for t, r in zip(trajectories[:count], responses[:count], strict=True)
    ]
