"""Several weighted rewards of one response, each kept apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from asyppo_megatron.config import RewardConfig
from asyppo_megatron.rewards.base import Sample, Status, Verdict, Verifier
from asyppo_megatron.rewards.pieces import bytes_of_tokens, cut


@dataclass(frozen=True)
class Judgement:
    """What all rewards of a response came to.

    Attributes:
        reward: weighted sum of the rewards of the whole response; it goes to the response's last token.
        status: "ok", or the first cause of a fallback 0.
        primary: raw score of the first reward, which decides what is correct and what evaluations report.
        token_rewards: f32 [R], weighted sum of the rewards of steps and tokens; None where no reward has any.
        scores: raw score of each reward by name.
        statuses: status of each reward by name.
    """

    reward: float
    status: Status
    primary: float
    token_rewards: np.ndarray | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    statuses: Mapping[str, Status] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Of the whole response, its steps and its tokens: what group advantages compare."""
        return self.reward if self.token_rewards is None else self.reward + float(self.token_rewards.sum(dtype=float))


class RewardSet:
    """The rewards of a run.

    Args:
        rewards: configuration and verifier of each, in order.
        tokenizer: of the responses; asked only where steps or tokens are scored.
    """

    def __init__(self, rewards: Sequence[tuple[RewardConfig, Verifier]], tokenizer: Any = None):
        self._rewards = {config.label: (config, verifier) for config, verifier in rewards}
        self._tokenizer = tokenizer
        self._threads = ThreadPoolExecutor(len(self._rewards), thread_name_prefix="reward")

    def judge(self, samples: Sequence[Sample], chosen: Sequence[Sequence[str]]) -> list[Judgement]:
        """Score every sample with its rewards; rewards work side by side.

        Args:
            samples: responses.
            chosen: names of each sample's rewards, the first is its primary one; empty: all.
        """
        names = [tuple(c) or tuple(self._rewards) for c in chosen]
        futures = {}
        for name in self._rewards:
            members = [i for i, wanted in enumerate(names) if name in wanted]
            if members:
                futures[name] = members, self._threads.submit(self._score, name, [samples[i] for i in members])
        verdicts: list[dict[str, Verdict]] = [{} for _ in samples]
        ends: list[dict[str, tuple[int, ...]]] = [{} for _ in samples]
        for name, (members, future) in futures.items():
            for i, (verdict, where) in zip(members, future.result(), strict=True):
                verdicts[i][name], ends[i][name] = verdict, where
        return [self._combine(*row) for row in zip(samples, names, verdicts, ends, strict=True)]

    def protections(self) -> dict[str, str]:
        """How the rewards that run programs protect the machine, by name."""
        found = {name: getattr(verifier, "protection", "") for name, (_, verifier) in self._rewards.items()}
        return {name: text for name, text in found.items() if text}

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for _, verifier in self._rewards.values():
            verifier.close()

    def _score(self, name: str, samples: list[Sample]) -> list[tuple[Verdict, tuple[int, ...]]]:
        """Verdicts and where their pieces end."""
        config, verifier = self._rewards[name]
        if config.per == "response":
            return [(verdict, ()) for verdict in verifier.score_many(samples)]
        cuts = [self._cut(s, config) for s in samples]
        known = [i for i, c in enumerate(cuts) if c is not None]
        scored = dict(zip(known, verifier.score_many([cuts[i] for i in known]), strict=True))  # type: ignore[misc]
        return [
            (scored[i], c.ends) if c is not None else (Verdict(0.0, "pieces_unmapped"), ()) for i, c in enumerate(cuts)
        ]

    def _cut(self, sample: Sample, config: RewardConfig) -> Sample | None:
        try:
            pieces = bytes_of_tokens(self._tokenizer, sample.response_tokens)
        except ValueError:
            return None
        texts, ends = cut(pieces, config.per, config.step_separator, config.max_steps)
        return sample._replace(pieces=texts, ends=ends)

    def _combine(
        self,
        sample: Sample,
        names: Sequence[str],
        verdicts: Mapping[str, Verdict],
        ends: Mapping[str, tuple[int, ...]],
    ) -> Judgement:
        total = []
        dense: np.ndarray | None = None
        for name in names:
            config, verdict = self._rewards[name][0], verdicts[name]
            if config.per == "response":
                total.append(config.weight * verdict.reward)
                continue
            dense = np.zeros(len(sample.response_tokens), dtype=np.float64) if dense is None else dense
            if verdict.pieces:
                np.add.at(dense, list(ends[name]), config.weight * np.array(verdict.pieces))
        bad = [verdicts[n].status for n in names if verdicts[n].status != "ok"]
        return Judgement(
            reward=math.fsum(total),
            status=bad[0] if bad else "ok",
            primary=verdicts[names[0]].reward,
            token_rewards=None if dense is None else dense.astype(np.float32),
            scores={n: verdicts[n].reward for n in names},
            statuses={n: verdicts[n].status for n in names},
        )
