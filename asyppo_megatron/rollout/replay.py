"""What a journalled step depends on: which of them may stand for a step that is asked for again."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from asyppo_megatron.config import Config
from asyppo_megatron.rollout import journal

log = logging.getLogger(__name__)

# Settings that decide when and where something is generated, not what.
_INDIFFERENT_REWARD: Any = {"workers": True, "model": {"url", "batch", "patience_s"}}
_INDIFFERENT = {"max_batch", "timeout_s", "sglang", "max_mismatch", "on_update", "partial", "max_staleness"}


class StepIdentity:
    """Equal identities mean rollouts of the same prompts, settings and weights."""

    def __init__(self, config: Config, stop_token_ids: tuple[int, ...]):
        settings = {
            "rollout": config.rollout.model_dump(mode="json", exclude=_INDIFFERENT),
            "rewards": [r.model_dump(mode="json", exclude=_INDIFFERENT_REWARD) for r in config.all_rewards],
            "data": config.data.model_dump(mode="json", include={"sources", "curriculum"}),
            "filtering": config.filtering.model_dump(mode="json"),
            "stops": stop_token_ids,
            "shuffle": config.data.shuffle,
        }
        self._fixed = {
            "seed": config.seed,
            "settings": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16],
        }
        self._max_staleness = config.rollout.max_staleness

    def of(self, step: int, policy_version: int, state_before: dict[str, Any]) -> dict[str, Any]:
        """All that a step's rollouts depend on, weights by the version of the oldest."""
        return {
            "step": step,
            "policy_version": policy_version,
            "rollout_state_before": state_before,
            **self._fixed,
        }

    def find(
        self, run_dir: Path, step: int, policy_version: int, state_before: dict[str, Any]
    ) -> dict[str, Any] | None:
        """Manifest of a complete step in the journal that may be taken as it is, or None.

        Args:
            policy_version: that a synchronous step must be of; an asynchronous one only must not be too stale.
        """
        try:
            _, manifest = journal.load_step(run_dir, step)
        except FileNotFoundError:
            return None
        except ValueError as e:
            log.warning("step %d: %s; generating it again", step, e)
            return None
        if self._max_staleness and manifest.get("policy_version", -1) >= step - self._max_staleness:
            policy_version = manifest["policy_version"]
        identity = self.of(step, policy_version, state_before)
        other = [key for key, value in identity.items() if manifest.get(key) != value]
        if other:
            log.info("step %d: the journal has one of another %s; generating it again", step, ", ".join(other))
            return None
        log.info("step %d: replayed from the journal", step)
        return manifest
