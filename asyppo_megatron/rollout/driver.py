"""What the rollout driver does: it generates, verifies and journals while the ranks train.

It runs in a process of its own (`server.py`). One thread answers commands; what uses the engine, a wave of generation
or an evaluation, runs in another: one after the other with the embedded engine, side by side with servers.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from asyppo_megatron.config import Config, RolloutConfig
from asyppo_megatron.models.spec import ModelSpec
from asyppo_megatron.rewards import build_rewards
from asyppo_megatron.rollout import journal
from asyppo_megatron.rollout.buffer import Group
from asyppo_megatron.rollout.discovery import EngineFinder
from asyppo_megatron.rollout.embedded import EmbeddedEngine
from asyppo_megatron.rollout.engine import Engine
from asyppo_megatron.rollout.evaluate import EvalResult, check_set_name, evaluate_set, write_rows
from asyppo_megatron.rollout.generation import group_requests
from asyppo_megatron.rollout.line import BatchLine
from asyppo_megatron.rollout.problems import build_eval_problems, build_train_problems
from asyppo_megatron.rollout.scoring import Scorer
from asyppo_megatron.rollout.tokenizer import find_stop_tokens, load_tokenizer

log = logging.getLogger(__name__)


def engine_device() -> torch.device:
    """Where the embedded engine of this process computes."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def build_engine(config: Config) -> Engine:
    """The engine that `rollout.engine` names, without weights yet."""
    if config.rollout.engine == "embedded":
        return build_embedded_engine(config)
    from asyppo_megatron.rollout.sglang import SGLangEngine  # aiohttp comes with SGLang, which not every machine has

    return SGLangEngine(config.rollout, EngineFinder(config), ModelSpec.from_hf(config.actor.model).vocab_size)


def build_embedded_engine(config: Config, model_dir: Path | None = None) -> EmbeddedEngine:
    """An engine in this process, in the actor's precision.

    Args:
        model_dir: whose architecture it has; `actor.model` by default.
    """
    dtype = torch.bfloat16 if config.actor.precision == "bf16" else torch.float32
    return EmbeddedEngine(model_dir or config.actor.model, dtype, engine_device(), config.rollout.max_batch)


class RolloutDriver:
    """What the driver does; a method a command. Every answer is a JSON object.

    Commands come from one thread; each generation ("wave") runs in another, and so do evaluations. What both touch
    is guarded by one lock.
    """

    def __init__(self, config: Config, run_dir: Path):
        self._config, self._run_dir = config, run_dir
        journal.remove_leftovers(run_dir)
        for item in config.data.eval:
            check_set_name(item.name)
        self._tokenizer = load_tokenizer(config.data.tokenizer or config.actor.model)
        self._stops = find_stop_tokens(self._tokenizer, config.actor.model, config.rollout.stop_token_ids)
        self._problems = build_train_problems(config, self._tokenizer)
        self._line = BatchLine(config, run_dir, self._problems, self._stops, engine_device())
        self._eval_sets = {item.name: build_eval_problems(config, self._tokenizer, item) for item in config.data.eval}
        rewards = build_rewards(config, self._tokenizer)  # their processes import while the engine is built
        self._engine = build_engine(config)
        self._scorer = Scorer(self._engine, self._tokenizer, rewards)
        self._protections = rewards.protections()
        self._threads = ThreadPoolExecutor(
            _wave_threads(config.rollout), thread_name_prefix="generate", initializer=limit_threads
        )
        self._changed = threading.Condition(threading.RLock())
        self._wanted: int | None = None  # the step that was started last
        self._waves = 0  # under way
        self._wave_count = 0
        self._failure: str | None = None

    def hello(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "policy_version": self._engine.policy_version,
            "num_problems": sum(len(p.items) for p in self._problems.values()),
            "num_skipped": sum(p.skipped for p in self._problems.values()),
            "stop_token_ids": list(self._stops),
            "protections": self._protections,
            "rollout_state": self._line.state,
        }

    def restore(self, rollout_state: dict[str, Any]) -> dict[str, Any]:
        """Continue the dataset where a checkpoint left it."""
        with self._changed:
            self._require_idle("restore")
            self._line.restore(rollout_state)
            self._line.next = None
        return {}

    def load_weights(self, path: str, policy_version: int) -> dict[str, Any]:
        """New weights; responses under way in asynchronous mode go on with them."""
        if not self._config.rollout.max_staleness:
            self._require_idle("load_weights")
        start = time.monotonic()
        self._engine.load_weights(Path(path), policy_version)
        return {"seconds": time.monotonic() - start}

    def begin_update(self, policy_version: int) -> dict[str, Any]:
        """The ranks are about to bring weights to the engines themselves; which engines there are.

        The version that is there already may be brought again at any time, for engines that have lost it.
        """
        if not self._config.rollout.max_staleness and policy_version != self._engine.policy_version:
            self._require_idle("begin_update")
        return {"urls": self._engine.begin_update()}

    def end_update(self, policy_version: int, path: str | None = None) -> dict[str, Any]:
        """They have; `path`: a directory that holds the same."""
        self._engine.end_update(policy_version, Path(path) if path is not None else None)
        return {}

    def pause(self) -> dict[str, Any]:
        """Stop generating where it is, for whoever changes the engines' weights or memory by another way."""
        self._engine.pause()
        return {}

    def resume(self) -> dict[str, Any]:
        self._engine.resume()
        return {}

    def start(self, step: int, policy_version: int) -> dict[str, Any]:
        """Have the batch of a step generated, and those that may run ahead of it; returns at once.

        Journalled steps of the same identity are taken as they are.
        """
        with self._changed:
            if not self._config.rollout.max_staleness:
                self._require_idle("start")
            if not self._waves:  # what failed before is tried again
                self._failure = None
            if self._line.next is None or not self._config.rollout.max_staleness:
                self._line.next = step
            self._line.replay(step, policy_version)
            if self._line.missing(step) and self._engine.policy_version != policy_version:
                raise ValueError(
                    f"start of step {step}: got policy_version {policy_version}, but the engine has "
                    f"{self._engine.policy_version}; load these weights first"
                )
            self._wanted = step
            self._engine.resume()
            self._fill()
            return {"replayed": self._line.next > step}

    def wait(self, step: int, timeout_s: float) -> dict[str, Any]:
        """Whether the step is in the journal, after at most `timeout_s`; with `error` when it never will be.

        Otherwise also whether engines wait for the current weights to be brought once more.
        """
        with self._changed:
            if step != self._wanted or self._line.next is None:
                raise ValueError(f"wait: got step {step}, but step {self._wanted} was started")
            self._changed.wait_for(lambda: self._line.next > step or self._failure is not None, timeout_s)
            if self._line.next > step:
                return {"ready": True}
            if self._failure is not None:
                return {"ready": False, "error": f"rollouts of step {step}: {self._failure}"}
            return {"ready": False, "needs_weights": self._engine.needs_weights}

    def evaluate(self, step: int, sets: list[str] | None = None) -> dict[str, Any]:
        """Evaluate the loaded weights; with the embedded engine after the generation under way."""
        names = list(self._eval_sets) if sets is None else sets
        unknown = [n for n in names if n not in self._eval_sets]
        if unknown:
            raise ValueError(f"evaluate: got sets {unknown}, need some of {list(self._eval_sets)}")
        self._engine.resume()
        results = [self._threads.submit(self._evaluate, step, name).result() for name in names]
        return {"results": [r.summary() for r in results]}

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._scorer.close()

    def _require_idle(self, command: str) -> None:
        if self._waves:
            raise RuntimeError(f"{command}: rollouts of step {self._wanted} are under way; wait for them first")

    def _fill(self) -> None:
        """Begin to generate as many groups as the bound on staleness allows, a batch at a time; under the lock."""
        assert self._wanted is not None
        missing = self._line.missing(self._wanted)
        while missing:
            groups = self._line.take(min(missing, self._config.rollout.prompts_per_step))
            missing -= len(groups)
            self._waves += 1
            self._wave_count += 1
            self._threads.submit(self._generate, self._wave_count, groups)

    def _journal_batches(self) -> None:
        """Write every batch that is complete; under the lock."""
        while (step := self._line.journal_batch(self._engine.statistics)) is not None:
            if self._config.rollout.partial and step == self._wanted:
                self._engine.pause()  # before the ranks hear of the batch, and use the device

    # --- in threads of their own

    def _generate(self, wave: int, groups: list[Group]) -> None:
        """Generate and score groups, then see which batches they complete."""
        config = self._config.rollout
        size = config.responses_per_prompt
        try:
            requests = group_requests(groups, config, self._stops, seed=self._config.seed)
            scores = self._scorer.run(requests, [groups[r.index // size].problem for r in requests])
            with self._changed:
                self._line.accept(groups, scores, wave)
                self._journal_batches()
                self._waves -= 1
                if self._failure is None:
                    self._fill()  # where groups were refused
                self._changed.notify_all()
        except Exception as e:  # whatever it is, the trainer must hear of it
            log.exception("rollouts of step %d failed", self._line.next)
            with self._changed:
                self._waves -= 1
                self._line.drop()
                self._failure = describe_error(e)
                self._changed.notify_all()

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


def _wave_threads(config: RolloutConfig) -> int:
    """The embedded engine does one thing after another; servers take all batches under way, and an evaluation."""
    return 1 if config.engine == "embedded" else config.max_staleness + 3


def describe_error(error: BaseException) -> str:
    """A message for the trainer; the log has the traceback."""
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def limit_threads() -> None:
    """One thread a process on a CPU: more only fight over the cores."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
