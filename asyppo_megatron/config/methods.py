"""One key, `method`, for the whole family: the defaults that each method brings, and what defines it.

A method's defaults stand behind the keys of the file and before those of the sections. What defines a method cannot
be set otherwise: that would be another method under its name. docs/methods.md has equations and sources.
"""

from __future__ import annotations

import logging
from copy import deepcopy
from typing import Any

from asyppo_megatron.config.run import Config

logger = logging.getLogger(__name__)

_NO_MASKS = {"advantage_mask_fraction": 0.0, "entropy_mask_fraction": 0.0, "entropy_coef": 0.0}
_GAE = {"advantage": "gae", "loss": "ppo"}
_GROUP = {"advantage": "grpo", "loss": "ppo", **_NO_MASKS}
_ANY, _ONE, _NONE = None, 1, 0  # critics that take part

Critics = int | None

# Method -> (critics that take part, defaults of the sections).
METHODS: dict[str, tuple[Critics, dict[str, Any]]] = {
    "asyppo": (_ANY, {"ppo": {**_GAE, "critic_data": "disjoint"}}),
    "ppo": (_ONE, {"ppo": {**_GAE, **_NO_MASKS}}),
    "symmetric_ppo": (_ONE, {"ppo": {**_GAE, **_NO_MASKS}}),
    "naive_ensemble": (_ANY, {"ppo": {**_GAE, **_NO_MASKS, "critic_data": "shared"}}),
    "grpo": (_NONE, {"ppo": _GROUP}),
    "dr_grpo": (_NONE, {"ppo": {**_GROUP, "advantage": "dr_grpo", "aggregation": "seq-mean-token-sum-norm"}}),
    "rloo": (_NONE, {"ppo": {**_GROUP, "advantage": "rloo", "aggregation": "token-mean"}}),
    "dapo": (
        _NONE,
        {
            "ppo": {**_GROUP, "clip_low": 0.2, "clip_high": 0.28, "aggregation": "token-mean"},
            "filtering": {"drop_equal_groups": True, "overlong_fraction": 0.2, "overlong_penalty": 1.0},
        },
    ),
    "gspo": (_NONE, {"ppo": {**_GROUP, "loss": "gspo", "clip_low": 3e-4, "clip_high": 4e-4}}),
    "cispo": (
        _NONE,
        {"ppo": {**_GROUP, "loss": "cispo", "clip_low": 1.0, "clip_high": 0.28, "aggregation": "token-mean"}},
    ),
    "vapo": (
        _ONE,
        {
            "ppo": {
                **_GAE,
                **_NO_MASKS,
                "order": "values_first",
                "critic_lam": 1.0,
                "length_adaptive_alpha": 0.05,
                "critic_warmup_steps": 50,
                "positive_nll_coef": 0.1,
                "clip_low": 0.2,
                "clip_high": 0.28,
                "aggregation": "token-mean",
            }
        },
    ),
    "aspo": (
        _NONE,
        {
            "ppo": {
                **_GROUP,
                "loss": "aspo",
                "clip_low": 0.2,
                "clip_high": 0.2,
                "high_entropy_clip": 0.4,
                "high_entropy_fraction": 0.2,
                "aggregation": "token-mean",
            }
        },
    ),
    "asympo": (_NONE, {"ppo": {**_GROUP, "loss": "asympo"}}),
    "spo": (_NONE, {"ppo": {**_GROUP, "loss": "spo", "negative_scale": 0.5}}),
    "custom": (_ANY, {}),
}
DEFINING = ("advantage", "loss", "critic_data")  # keys of `ppo` that make a method what it is


def resolve(tree: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A configuration's tree with its method's defaults filled in, and what contradicts the method.

    Without `method` it is asyppo, or custom where the tree itself sets a defining key otherwise.
    """
    tree = deepcopy(tree)
    ppo = tree.get("ppo")
    ppo = ppo if isinstance(ppo, dict) else {}
    if "method" not in tree:
        tree["method"] = "custom" if _contradictions("asyppo", ppo) else "asyppo"
    method = tree["method"]
    if not isinstance(method, str) or method not in METHODS:
        return tree, []  # what is wrong with it, validation says
    errors = _contradictions(method, ppo)
    return _filled(tree, METHODS[method][1]), errors


def _contradictions(method: str, ppo: dict[str, Any]) -> list[str]:
    wanted = METHODS[method][1].get("ppo", {})
    return [
        f"ppo.{key}: got {ppo[key]} with method {method}, need {wanted[key]}; leave it out, or choose another method "
        "(custom defines nothing)"
        for key in DEFINING
        if key in ppo and key in wanted and ppo[key] != wanted[key]
    ]


def _filled(tree: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """`tree` with the defaults under it, section by section."""
    for key, value in defaults.items():
        if not isinstance(value, dict):
            tree.setdefault(key, value)
        elif isinstance(tree.setdefault(key, {}), dict):  # else validation says what is wrong
            tree[key] = _filled(tree[key], value)
    return tree


def select_critics(config: Config) -> tuple[Config, list[str]]:
    """Keep the critics that take part: as many as the method uses, the first of those listed.

    So one file serves every method. What contradicts is an error: `critics_used` that the method has no use for, or
    more than are listed.
    """
    listed, wanted, uses = config.num_critics, config.critics_used, METHODS[config.method][0]
    if wanted is not None and uses is not None and wanted != uses:
        return config, [
            f"critics_used: got {wanted} with method {config.method}, which uses {uses or 'none'}; leave it out"
        ]
    count = wanted if wanted is not None else listed if uses is None else min(uses, listed)
    if count > listed:
        return config, [f"critics_used: got {count}, need at most the {listed} critic(s) listed; add critics"]
    if uses == _ONE and count == 0:
        return config, [f"critics: got none with method {config.method}, need 1; add a critic"]
    if count < listed:
        logger.info("method %s: %d of the %d critics listed take part", config.method, count, listed)
    critics = config.critics[:count]
    if config.method == "symmetric_ppo":
        critics = tuple(c.model_copy(update={"model": config.actor.model}) for c in critics)
    return config.model_copy(update={"critics": critics}), []


def pretraining(config: Config, steps: int) -> tuple[Config, list[str]]:
    """The run that trains a configuration's critics alone: `steps` batches of the unchanged policy.

    Its directory lies inside the run's, so that both can be kept.
    """
    if not config.critics:
        return config, [
            f"pretrain-critics: got no critics with method {config.method}, need one; choose another method"
        ]
    update = {
        "num_steps": steps,
        "run_dir": config.run_dir / "pretrain-critics",
        "ppo": config.ppo.model_copy(update={"critic_warmup_steps": steps}),
        "eval": config.eval.model_copy(update={"every": 0}),  # of a policy that does not change
        "checkpoint": config.checkpoint.model_copy(update={"export_hf": True}),
    }
    return config.model_copy(update=update), []
