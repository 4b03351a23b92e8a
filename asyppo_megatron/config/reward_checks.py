"""Cross-checks of rewards and sources of problems."""

from __future__ import annotations

import re

from asyppo_megatron.config.data import EvalSetConfig, SourceConfig
from asyppo_megatron.config.rewards import RewardConfig
from asyppo_megatron.config.run import Config

_NAME = re.compile(r"[A-Za-z0-9_.-]+")


def reward_errors(config: Config) -> list[str]:
    """Everything that is wrong about `reward`, `rewards` and the sources that name them."""
    errors: list[str] = []
    if config.rewards and config.reward != RewardConfig():
        errors.append("reward: got it beside rewards, need one of them; move it into the list")
    for where, reward in config.rewards_by_place():
        errors.extend(_reward_errors(where, reward))
    names = [r.label for r in config.all_rewards]
    if len(set(names)) != len(names):
        errors.append(f"rewards: got names {names}, need distinct ones; set name (the kind by default)")
    data = config.data
    if (data.train is None) == (not data.sources):
        found = "both" if data.sources else "neither"
        errors.append(f"data: got {found} of train and sources, need one of them; name the training problems once")
    sources = [s.name for s in data.sources]
    if len(set(sources)) != len(sources):
        errors.append(f"data.sources: got names {sources}, need distinct ones; rename one")
    for index, source in enumerate(data.sources):
        errors.extend(_choice_errors(f"data.sources.{index}", source, names))
    for index, item in enumerate(data.eval):
        errors.extend(_choice_errors(f"data.eval.{index}", item, names))
    return errors


def _choice_errors(where: str, item: SourceConfig | EvalSetConfig, names: list[str]) -> list[str]:
    errors = []
    if isinstance(item, SourceConfig) and not _NAME.fullmatch(item.name):
        errors.append(f"{where}.name: got {item.name!r}, need letters, digits, '_', '-', '.'; rename the source")
    unknown = [n for n in item.rewards if n not in names]
    if unknown:
        errors.append(f"{where}.rewards: got {unknown}, need some of {names}; name a reward or add it to rewards")
    if len(set(item.rewards)) != len(item.rewards):
        errors.append(f"{where}.rewards: got {list(item.rewards)}, need each name once; remove the second one")
    return errors


def _reward_errors(where: str, reward: RewardConfig) -> list[str]:
    errors = []
    if not _NAME.fullmatch(reward.label):
        errors.append(f"{where}.name: got {reward.name!r}, need letters, digits, '_', '-', '.'; rename the reward")
    if reward.per != "response" and reward.kind not in ("function", "model"):
        errors.append(
            f"{where}.per: got {reward.per} with kind {reward.kind}, need response; only function and model score "
            "steps or tokens"
        )
    try:
        if re.compile(reward.step_separator).match(""):
            errors.append(f"{where}.step_separator: got {reward.step_separator!r}, which matches nothing at all")
    except re.error as e:
        errors.append(f"{where}.step_separator: got {reward.step_separator!r}, which is no regular expression: {e}")
    module, colon, name = reward.function.partition(":")
    wanted = reward.kind == "function"
    if wanted and not (colon and name.isidentifier() and all(p.isidentifier() for p in module.split("."))):
        errors.append(f"{where}.function: got {reward.function!r}, need package.module:function")
    if wanted != bool(reward.function) and not wanted:
        errors.append(f"{where}.function: got {reward.function!r} with kind {reward.kind}, need kind function")
    if reward.kind == "model" and not re.match(r"https?://[^/\s]+", reward.model.url):
        errors.append(f"{where}.model.url: got {reward.model.url!r}, need http://host:port of a reward model's server")
    if reward.kind == "model" and reward.model.api == "sglang" and reward.per == "token":
        errors.append(
            f"{where}.per: got token with model.api sglang, which scores whole sequences only; choose step, or a "
            "server of model.api pooling"
        )
    return errors
