"""What is wrong with the rewards of a run, before anything else starts."""

from __future__ import annotations

import shutil

from asyppo_megatron.config import Config
from asyppo_megatron.rewards.code import CodeReward
from asyppo_megatron.rewards.exact import ExactMatch


def reward_errors(config: Config) -> list[str]:
    """Patterns that are none, interpreters that are missing, machines that cannot isolate programs."""
    errors = []
    for where, reward in config.rewards_by_place():
        try:
            if reward.kind == "exact":
                ExactMatch(reward.answer_pattern, reward.timeout_s)
            if reward.kind == "code":
                python = reward.sandbox.python
                if python is not None and shutil.which(python) is None:
                    raise ValueError(f"reward.sandbox.python: got {python}, need an executable interpreter")
                CodeReward(reward.model_copy(update={"workers": 1})).close()
        except (ValueError, RuntimeError) as e:
            errors.append(str(e).replace("reward.", f"{where}.", 1) if where != "reward" else str(e))
    return errors
