"""Cross-checks: what is wrong between sections."""

from __future__ import annotations

import math

from asyppo_megatron.config.algorithm import WITHOUT_OLD_LOGPROBS, PPOConfig
from asyppo_megatron.config.engines import engine_errors, offload_errors, staleness_errors, transport_errors
from asyppo_megatron.config.reward_checks import reward_errors
from asyppo_megatron.config.roles import RoleConfig
from asyppo_megatron.config.run import Config

FUSED_LOSSES = ("ppo", "cispo", "aspo")  # tokens independent of each other, given (logprob, entropy)


def cross_checks(config: Config) -> list[str]:
    """Everything that is wrong between sections; empty when nothing is."""
    errors: list[str] = []
    for name, role in config.roles().items():
        errors.extend(_role_errors(name, role, config.batch_size))
    errors.extend(_placement_errors(config))
    errors.extend(_algorithm_errors(config))
    errors.extend(reward_errors(config))
    errors.extend(_fused_head_errors(config))
    if config.rollout.top_p < 1 and config.rollout.top_k == 1:
        errors.append("rollout: got top_k 1 with top_p < 1, need one of them; set top_p 1.0 for greedy rollouts")
    errors.extend(engine_errors(config.rollout))
    errors.extend(staleness_errors(config))
    errors.extend(offload_errors(config))
    errors.extend(transport_errors(config))
    names = [e.name for e in config.data.eval]
    if len(set(names)) != len(names):
        errors.append(f"data.eval: got names {names}, need distinct ones; rename one")
    if config.eval.every and not config.data.eval:
        errors.append("eval.every: got a period but no data.eval set; add one or set eval.every=0")
    return errors


def _role_errors(name: str, role: RoleConfig, batch_size: int) -> list[str]:
    errors = []
    layout, ranks = role.layout, role.ranks
    where = name.replace("critic_", "critics.")
    size = layout.tp * layout.pp * layout.cp
    if not ranks or len(set(ranks)) != len(ranks) or min(ranks, default=0) < 0:
        errors.append(f"{where}.ranks: got {list(ranks)}, need distinct ranks >= 0")
    elif len(ranks) % size:
        errors.append(
            f"{where}.layout: got tp {layout.tp} x pp {layout.pp} x cp {layout.cp} = {size} on {len(ranks)} ranks, "
            f"need a divisor of {len(ranks)}; change the layout or {where}.ranks"
        )
    if layout.sequence_parallel and layout.tp == 1:
        errors.append(f"{where}.layout.sequence_parallel: got true with tp 1, need tp > 1; leave it out")
    least = math.lcm(2 * layout.cp if layout.cp > 1 else 1, layout.cp * layout.tp if layout.sp else 1)
    if role.max_tokens_per_micro_batch < least:
        errors.append(
            f"{where}.max_tokens_per_micro_batch: got {role.max_tokens_per_micro_batch}, need at least {least}, which "
            f"packs are padded to a multiple of with tp {layout.tp} and cp {layout.cp}; raise it"
        )
    if role.mini_batch_size is not None and (role.mini_batch_size > batch_size or batch_size % role.mini_batch_size):
        errors.append(
            f"{where}.mini_batch_size: got {role.mini_batch_size}, need a divisor of the {batch_size} responses of a "
            "step (rollout.prompts_per_step x responses_per_prompt)"
        )
    if role.optimizer.min_lr > role.optimizer.lr:
        errors.append(f"{where}.optimizer.min_lr: got {role.optimizer.min_lr} > lr {role.optimizer.lr}; lower it")
    return errors


def _fused_head_errors(config: Config) -> list[str]:
    actor, ppo = config.actor, config.ppo
    errors = []
    if not actor.fused_head:
        if actor.fused_head_fp32_logits:
            errors.append("actor.fused_head_fp32_logits: got true without the fused head; set actor.fused_head=true")
        return errors
    if ppo.loss not in FUSED_LOSSES:
        errors.append(
            f"actor.fused_head: got true with ppo.loss {ppo.loss}, which needs sums over a response; need one of "
            f"{', '.join(FUSED_LOSSES)}, or set actor.fused_head=false"
        )
    extras = {
        "a KL term in the loss": ppo.kl.coef > 0 and ppo.kl.where == "loss",
        "ppo.high_entropy_clip": ppo.high_entropy_clip is not None,
        "ppo.positive_nll_coef": ppo.positive_nll_coef > 0,
    }
    errors.extend(
        f"actor.fused_head: got true with {what}, which it does not compute; leave one of the two out"
        for what, is_set in extras.items()
        if is_set
    )
    return errors


def _placement_errors(config: Config) -> list[str]:
    errors = []
    spans = {name: set(role.ranks) for name, role in config.roles().items()}
    names = list(spans)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            if spans[a] & spans[b] and spans[a] != spans[b] and not (spans[a] <= spans[b] or spans[b] <= spans[a]):
                errors.append(
                    f"ranks: got {a} on {sorted(spans[a])} and {b} on {sorted(spans[b])}, which overlap in part; "
                    "give them the same ranks, one inside the other, or disjoint ones"
                )
    used = set().union(*spans.values())
    if used and used != set(range(max(used) + 1)):
        missing = sorted(set(range(max(used) + 1)) - used)
        errors.append(f"ranks: got no role on {missing}, need every rank from 0 to {max(used)} used; close the gap")
    return errors


def _algorithm_errors(config: Config) -> list[str]:
    return [*_mask_errors(config), *_critic_errors(config), *_group_errors(config), *_loss_errors(config.ppo)]


def _mask_errors(config: Config) -> list[str]:
    errors, critics = [], config.num_critics
    k, h = config.ppo.advantage_mask_fraction, config.ppo.entropy_mask_fraction
    if k + h > 1:
        errors.append(f"ppo: got advantage_mask_fraction {k} + entropy_mask_fraction {h} > 1; lower one")
    if (k > 0 or h > 0) and critics < 2:
        errors.append(
            f"ppo: got masks (advantage {k}, entropy {h}) with {critics} critic(s), need >= 2 to disagree; "
            "add a critic or set both fractions to 0"
        )
    return errors


def _critic_errors(config: Config) -> list[str]:
    ppo, critics, group = config.ppo, config.num_critics, config.rollout.responses_per_prompt
    errors = []
    if ppo.advantage == "gae" and critics == 0:
        errors.append("critics: got none with ppo.advantage gae, need >= 1; add a critic or choose grpo/dr_grpo/rloo")
    if ppo.advantage != "gae" and critics:
        errors.append(
            f"critics: got {critics} with ppo.advantage {ppo.advantage}, which uses none; remove them or choose gae"
        )
    if critics > 1 and group % critics and ppo.share_remainder == "error" and ppo.critic_data == "disjoint":
        errors.append(
            f"rollout.responses_per_prompt: got {group}, not divisible by {critics} critics; choose a multiple of "
            f"{critics} or set ppo.share_remainder to rotate or drop"
        )
    if ppo.order == "critics_first":
        for index, critic in enumerate(config.critics):
            if critic.value_clip is not None:
                errors.append(
                    f"critics.{index}.value_clip: got {critic.value_clip} with ppo.order critics_first, which has no "
                    "values from before the update; set ppo.order values_first or leave it out"
                )
        if ppo.critic_lam not in (None, 1.0):
            errors.append(
                f"ppo.critic_lam: got {ppo.critic_lam} with ppo.order critics_first, whose target is the Monte-Carlo "
                "return (lambda 1); set ppo.order values_first or leave it out"
            )
    if critics == 0:
        errors.extend(
            f"ppo.{key}: got {value} without critics, which it is about; leave it out or add critics"
            for key, value, idle in [
                ("critic_warmup_steps", ppo.critic_warmup_steps, 0),
                ("policy_every", ppo.policy_every, 1),
                ("length_adaptive_alpha", ppo.length_adaptive_alpha, None),
            ]
            if value != idle
        )
    return errors


def _group_errors(config: Config) -> list[str]:
    if config.rollout.responses_per_prompt > 1:
        return []
    errors = []
    if config.ppo.advantage != "gae":
        errors.append(f"rollout.responses_per_prompt: got 1 with ppo.advantage {config.ppo.advantage}, need >= 2")
    if config.filtering.drop_equal_groups:
        errors.append("rollout.responses_per_prompt: got 1 with filtering.drop_equal_groups, need >= 2 to differ")
    return errors


def _loss_errors(ppo: PPOConfig) -> list[str]:
    """Settings of the policy loss that the chosen loss would ignore."""
    found = {
        "dual_clip": (ppo.dual_clip, ppo.dual_clip is not None and ppo.loss not in ("ppo", "gspo")),
        "high_entropy_clip": (
            ppo.high_entropy_clip,
            ppo.high_entropy_clip is not None and ppo.loss not in ("ppo", "cispo", "aspo"),
        ),
        "importance": (ppo.importance, ppo.importance != "none" and ppo.loss in WITHOUT_OLD_LOGPROBS),
    }
    return [
        f"ppo.{key}: got {value} with ppo.loss {ppo.loss}, which has no use for it; leave it out or change the loss"
        for key, (value, is_ignored) in found.items()
        if is_ignored
    ]
