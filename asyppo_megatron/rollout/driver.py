"""What the rollout driver does: it generates, verifies and journals while the ranks train.

It runs in a process of its own (`server.py`). One thread answers commands, one uses the engine: generation and
evaluation, in the order asked for.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any

import torch

from asyppo_megatron.backend import peak_memory_gb
from asyppo_megatron.config import Config
from asyppo_megatron.rewards import build_rewards
from asyppo_megatron.rollout import journal
from asyppo_megatron.rollout.dataset import Problem
from asyppo_megatron.rollout.embedded import EmbeddedEngine
from asyppo_megatron.rollout.evaluate import EvalResult, check_set_name, evaluate_set, write_rows
from asyppo_megatron.rollout.generation import sample_rows, step_requests, step_statistics, step_trajectories
from asyppo_megatron.rollout.problems import build_eval_problems, build_prompts, build_train_problems
from asyppo_megatron.rollout.reward_statistics import passes_and_tries
from asyppo_megatron.rollout.scoring import Scorer
from asyppo_megatron.rollout.tokenizer import find_stop_tokens, load_tokenizer
from asyppo_megatron.types import pack_trajectories

log = logging.getLogger(__name__)


def engine_device() -> torch.device:
    """Where the embedded engine of this process computes."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build_engine(config: Config, model_dir: Path | None = None) -> EmbeddedEngine:
    """The engine that `rollout.engine` names, in the actor's precision, without weights yet.

    Args:
        model_dir: whose architecture it has; `actor.model` by default.
    """
    device = engine_device()
    dtype = torch.bfloat16 if config.actor.precision == "bf16" else torch.float32
    return EmbeddedEngine(model_dir or config.actor.model, dtype, device, config.rollout.max_batch)


class RolloutDriver:
    """What the driver does; a method a command. Every answer is a JSON object."""

    def __init__(self, config: Config, run_dir: Path):
        self._config, self._run_dir = config, run_dir
        journal.remove_leftovers(run_dir)
        for item in config.data.eval:
            check_set_name(item.name)
        self._tokenizer = load_tokenizer(config.data.tokenizer or config.actor.model)
        self._stops = find_stop_tokens(self._tokenizer, config.actor.model, config.rollout.stop_token_ids)
        self._problems = build_train_problems(config, self._tokenizer)
        self._cursor = build_prompts(config, self._problems)
        self._eval_sets = {item.name: build_eval_problems(config, self._tokenizer, item) for item in config.data.eval}
        rewards = build_rewards(config, self._tokenizer)  # their processes import while the engine is built
        self._engine = build_engine(config)
        self._scorer = Scorer(self._engine, self._tokenizer, rewards)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="generate", initializer=limit_threads)
        self._step: int | None = None
        self._generation: Future[None] | None = None

    def hello(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "policy_version": self._engine.policy_version,
            "num_problems": sum(len(p.items) for p in self._problems.values()),
            "num_skipped": sum(p.skipped for p in self._problems.values()),
            "stop_token_ids": list(self._stops),
            "rollout_state": self._cursor.state() | self._cursor.results(),
        }

    def restore(self, rollout_state: dict[str, Any]) -> dict[str, Any]:
        """Continue the dataset where a checkpoint left it."""
        self._require_idle("restore")
        self._cursor.restore(rollout_state)
        return {}

    def load_weights(self, path: str, policy_version: int) -> dict[str, Any]:
        self._require_idle("load_weights")
        start = time.monotonic()
        self._engine.load_weights(Path(path), policy_version)
        return {"seconds": time.monotonic() - start}

    def start(self, step: int, policy_version: int) -> dict[str, Any]:
        """Begin a step's rollouts and return at once; a journalled step of the same identity is taken as it is."""
        self._require_idle("start")
        identity = self._identity(step, policy_version)
        if self._replays(step, identity):
            self._step, self._generation = step, None
            return {"replayed": True}
        if self._engine.policy_version != policy_version:
            raise ValueError(
                f"start of step {step}: got policy_version {policy_version}, but the engine has "
                f"{self._engine.policy_version}; load these weights first"
            )
        problems = self._cursor.take(self._config.rollout.prompts_per_step)
        self._step = step
        self._generation = self._thread.submit(self._generate, step, problems, identity)
        return {"replayed": False}

    def wait(self, step: int, timeout_s: float) -> dict[str, Any]:
        """Whether the step is in the journal, after at most `timeout_s`; with `error` when it never will be."""
        if step != self._step:
            raise ValueError(f"wait: got step {step}, but step {self._step} was started")
        if self._generation is None:
            return {"ready": True}
        try:
            error = self._generation.exception(timeout_s)
        except FutureTimeoutError:
            return {"ready": False}
        if error is not None:
            return {"ready": False, "error": f"rollouts of step {step}: {describe_error(error)}"}
        return {"ready": True}

    def evaluate(self, step: int, sets: list[str] | None = None) -> dict[str, Any]:
        """Evaluate the loaded weights, after the generation under way if there is one."""
        names = list(self._eval_sets) if sets is None else sets
        unknown = [n for n in names if n not in self._eval_sets]
        if unknown:
            raise ValueError(f"evaluate: got sets {unknown}, need some of {list(self._eval_sets)}")
        results = [self._thread.submit(self._evaluate, step, name).result() for name in names]
        return {"results": [r.summary() for r in results]}

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._scorer.close()

    def _require_idle(self, command: str) -> None:
        if self._generation is not None and not self._generation.done():
            raise RuntimeError(f"{command}: rollouts of step {self._step} are under way; wait for them first")

    def _identity(self, step: int, policy_version: int) -> dict[str, Any]:
        """All that a step's rollouts depend on, weights by version; equal identities mean equal rollouts."""
        settings = {
            "rollout": self._config.rollout.model_dump(mode="json", exclude={"max_batch", "timeout_s"}),
            "rewards": [r.model_dump(mode="json", exclude={"workers"}) for r in self._config.all_rewards],
            "data": self._config.data.model_dump(mode="json", include={"sources", "curriculum"}),
            "stops": self._stops,
            "shuffle": self._config.data.shuffle,
        }
        return {
            "step": step,
            "policy_version": policy_version,
            "seed": self._config.seed,
            "rollout_state_before": self._cursor.state() | self._cursor.results(),
            "settings": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16],
        }

    def _replays(self, step: int, identity: dict[str, Any]) -> bool:
        """Take a complete step from the journal when it is the one asked for."""
        try:
            _, manifest = journal.load_step(self._run_dir, step)
        except FileNotFoundError:
            return False
        except ValueError as e:
            log.warning("step %d: %s; generating it again", step, e)
            return False
        other = [key for key, value in identity.items() if manifest.get(key) != value]
        if other:
            log.info("step %d: the journal has one of another %s; generating it again", step, ", ".join(other))
            return False
        self._cursor.restore(manifest["rollout_state_after"])
        log.info("step %d: replayed from the journal", step)
        return True

    def _generate(self, step: int, problems: list[Problem], identity: dict[str, Any]) -> None:
        config = self._config.rollout
        requests = step_requests(problems, config, self._stops, seed=self._config.seed, step=step)
        group_size = config.responses_per_prompt
        scores = self._scorer.run(requests, [problems[r.index // group_size] for r in requests])
        self._cursor.record(problems, *passes_and_tries(scores.responses, group_size))
        trajectories = step_trajectories(problems, scores.responses, group_size)
        statistics = step_statistics(trajectories, scores, problems) | self._cursor.statistics()
        journal.write_step(
            self._run_dir,
            pack_trajectories(trajectories, step),
            {
                **identity,
                "rollout_state_after": self._cursor.state() | self._cursor.results(),
                "statistics": statistics,
                "memory_gb": peak_memory_gb(engine_device()),
            },
            sample_rows(problems, trajectories, scores.responses, journal.SAMPLES_SHOWN),
        )
        log.info("step %d: %s", step, json.dumps(statistics))

    def _evaluate(self, step: int, name: str) -> EvalResult:
        result = evaluate_set(
            self._scorer,
            self._eval_sets[name],
            name,
            self._config.eval,
            max_new_tokens=self._config.rollout.max_response_tokens,
            stop_token_ids=self._stops,
            seed=self._config.seed,
        )
        write_rows(self._run_dir / "eval" / f"step-{step:06d}", result)
        log.info("evaluation at step %d: %s", step, json.dumps(result.summary()))
        return result


def describe_error(error: BaseException) -> str:
    """A message for the trainer; the log has the traceback."""
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def limit_threads() -> None:
    """One thread a process on a CPU: more only fight over the cores."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
