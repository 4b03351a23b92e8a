"""Rewards of a model that an engine serves over HTTP: for a whole response, for its steps, or for its tokens.

Two documented interfaces. SGLang's `/classify` (a reward or classification model with `--is-embedding`) scores whole
sequences: a step is scored by the sequence up to its last token. `/pooling`, as vLLM has it and
`asyppo_megatron.rewards.serve_model` too, scores every token of a sequence at once. Both read token ids, so the reward
model shares the policy's vocabulary.
"""

from __future__ import annotations

import json
import logging
import math
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from asyppo_megatron.config import RewardConfig
from asyppo_megatron.rewards.base import Sample, Verdict

log = logging.getLogger(__name__)

MAX_REPLY_BYTES = 1 << 28
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0


class RefusedError(Exception):
    """The server understood and refused a request: repeating it helps nobody."""


class ModelReward:
    """Asks a reward model's server. A server that stays away ends the run: zeros in its place would be learned."""

    def __init__(self, config: RewardConfig):
        self._config, self._model = config, config.model
        self._threads = ThreadPoolExecutor(config.workers, thread_name_prefix="reward-model")
        # Never through a proxy of the environment: the server is the run's own.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def score_many(self, samples: Sequence[Sample]) -> list[Verdict]:
        """Verdicts in the samples' order.

        Raises:
            RuntimeError: the server did not answer for `patience_s`.
        """
        sequences, owners = [], []
        for number, sample in enumerate(samples):
            for sequence in self._sequences(sample):
                sequences.append(sequence)
                owners.append(number)
        size = self._model.batch
        chunks = [sequences[i : i + size] for i in range(0, len(sequences), size)]
        found = [scores for chunk in self._threads.map(self._score_chunk, chunks) for scores in chunk]
        by_sample: list[list[list[float] | None]] = [[] for _ in samples]
        for owner, scores in zip(owners, found, strict=True):
            by_sample[owner].append(scores)
        return [self._verdict(sample, scores) for sample, scores in zip(samples, by_sample, strict=True)]

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _sequences(self, sample: Sample) -> list[list[int]]:
        """What is sent for a sample: prompt and response, for SGLang one prefix a step."""
        whole = [*sample.prompt_tokens, *sample.response_tokens]
        if self._config.per == "response" or (self._model.api == "pooling" and sample.pieces):
            return [whole]
        return [whole[: len(sample.prompt_tokens) + end + 1] for end in sample.ends]

    def _score_chunk(self, sequences: list[list[int]]) -> list[list[float] | None]:
        """Scores of each sequence (one, or one a token); None where the server refuses it."""
        try:
            return self._ask(sequences)
        except RefusedError as e:
            if len(sequences) > 1:  # one of them spoils the request for all
                return [found for s in sequences for found in self._score_chunk([s])]
            log.warning("reward model %s: refused a sequence of %d tokens: %s", self._model.url, len(sequences[0]), e)
            return [None]

    def _ask(self, sequences: list[list[int]]) -> list[list[float] | None]:
        if self._model.api == "sglang":
            answer = self._post("/classify", {"input_ids": sequences} | self._named())
            items = answer if isinstance(answer, list) else [answer]
            found = [_vector(item, "embedding") for item in items]
            need = [1] * len(sequences)
        else:
            answer = self._post("/pooling", {"input": sequences} | self._named())
            items = sorted(answer.get("data", []), key=lambda item: item["index"]) if isinstance(answer, dict) else []
            found = [_vector(item, "data") for item in items]
            need = [len(s) for s in sequences]
        got = [len(f) for f in found]
        if got != need:
            raise RuntimeError(
                f"reward model {self._model.url}: got scores of sizes {got[:8]}, need {need[:8]}; serve a model with "
                "one label, under the interface that reward.model.api names"
            )
        return list(found)

    def _named(self) -> dict[str, str]:
        return {"model": self._model.name} if self._model.name else {}

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON answer; repeated with growing pauses while the server is away or overloaded."""
        data = json.dumps(body).encode()
        url = self._model.url.rstrip("/") + path
        deadline, pause = time.monotonic() + self._model.patience_s, FIRST_PAUSE_S
        while True:
            request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
            try:
                with self._opener.open(request, timeout=self._config.timeout_s) as reply:
                    return json.loads(reply.read(MAX_REPLY_BYTES))
            except urllib.error.HTTPError as e:
                problem = f"HTTP {e.code}: {e.read(500).decode('utf-8', 'replace')}"
                if e.code < 500 and e.code not in (408, 429):
                    raise RefusedError(problem) from None
            except (OSError, ValueError) as e:  # unreachable, slow, cut off, no JSON
                problem = f"{type(e).__name__}: {e}"
            if time.monotonic() + pause > deadline:
                raise RuntimeError(
                    f"reward model {url}: no answer for {self._model.patience_s:.0f} s ({problem}); start it again and "
                    "resume, or raise reward.timeout_s where it is merely slow"
                )
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _verdict(self, sample: Sample, scores: list[list[float] | None]) -> Verdict:
        if any(s is None for s in scores):
            return Verdict(0.0, "model_refused")
        known = [s for s in scores if s is not None]
        if self._config.per == "response":
            values = [known[0][-1]]
        elif self._model.api == "pooling":
            values = [known[0][len(sample.prompt_tokens) + end] for end in sample.ends] if known else []
        else:
            values = [s[0] for s in known]
        if self._model.transform == "sigmoid":
            values = [_sigmoid(v) for v in values]
        if not all(map(math.isfinite, values)):
            return Verdict(0.0, "model_value")
        if self._config.per == "response":
            return Verdict(values[0])
        return Verdict(math.fsum(values), "ok", tuple(values))


def _vector(item: Any, key: str) -> list[float]:
    """A list of scores: plain numbers, or one-label vectors."""
    value = item.get(key) if isinstance(item, dict) else None
    if isinstance(value, int | float):
        return [float(value)]
    if not isinstance(value, list):
        return []
    flat = [v[0] if isinstance(v, list) and len(v) == 1 else v for v in value]
    return [float(v) if isinstance(v, int | float) else math.nan for v in flat]


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
