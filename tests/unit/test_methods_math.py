"""Every method's advantages and loss, as its one key sets them, against the papers' formulas written out once more.

The formulas here are loops over responses and tokens in Python, in float64, with the papers' numbers in them; gradients
are autograd's of these loops.
"""

from __future__ import annotations

import math
import statistics
from itertools import pairwise
from typing import Any

import pytest
import torch

from asyppo_megatron.config import build_config
from asyppo_megatron.config.algorithm import PPOConfig
from asyppo_megatron.config.methods import METHODS
from asyppo_megatron.ppo.advantages import length_adaptive_lambda
from asyppo_megatron.ppo.losses import high_entropy_clip, kl_loss, policy_loss, positive_nll_loss
from asyppo_megatron.ppo.segments import first_and_last, token_sequences
from asyppo_megatron.ppo.targets import compute_targets
from asyppo_megatron.types import PackedBatch, Scores

F64 = torch.float64
LONGEST = 40  # tokens, of rollout.max_response_tokens
SIZES = (9, 4, 31, 12, 6, 26, 3, 17)  # tokens of the responses' sequences
GROUPS = (0, 0, 0, 0, 1, 1, 1, 1)
REWARDS = (1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0)
ALL = [m for m in METHODS if m != "custom"]
PROMPT = 2  # leading tokens of a sequence that are no actions, but for the last


def settings(method: str, **ppo: Any) -> PPOConfig:
    """What `method` resolves to."""
    critic = {"model": "c"}
    tree = {"method": method, "actor": {"model": "a"}, "critics": [critic, critic], "data": {"train": "t"}, "ppo": ppo}
    return build_config(tree).ppo


class Case:
    """A batch, scores of all kinds, and its responses' tokens."""

    def __init__(self, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        total = sum(SIZES)
        cu = torch.tensor([0, *SIZES]).cumsum(0).to(torch.int32)
        mask = torch.zeros(total, dtype=torch.bool)
        self.responses = [list(range(start + PROMPT - 1, end - 1)) for start, end in pairwise(cu.tolist())]
        self.responses[2].pop(7)  # a token of a tool in the middle of a response
        for tokens in self.responses:
            mask[tokens] = True

        def draw() -> torch.Tensor:
            return torch.randn(total, generator=generator, dtype=F64)

        self.old = -draw().abs() - 0.1
        self.new = self.old + 0.4 * draw()
        # One ratio in every branch of a clip, of a soft dual clip and of what lies between, for both signs.
        for tokens, gap in zip(self.responses[:6], [1.3, -1.3, 0.25, -0.25, 1.5, -1.5], strict=True):
            self.new[tokens[0]] = self.old[tokens[0]] + gap
        self.entropies, self.reference = draw().abs(), self.old + 0.3 * draw()
        self.values = 0.5 + 0.2 * torch.randn(2, total, generator=generator, dtype=F64)
        self.batch = PackedBatch(
            step=0,
            policy_version=0,
            tokens=torch.zeros(total, dtype=torch.int32),
            cu_seqlens=cu,
            loss_mask=mask,
            rollout_logprobs=torch.where(mask, self.old, 0),
            rewards=torch.tensor(REWARDS, dtype=F64),
            group_ids=torch.tensor(GROUPS),
            truncated=torch.zeros(len(SIZES), dtype=torch.bool),
        )


def targets_of(case: Case, ppo: PPOConfig, num_critics: int):
    batch = case.batch
    lam: Any = ppo.lam
    if ppo.length_adaptive_alpha is not None:
        lam = length_adaptive_lambda(batch.loss_mask, batch.cu_seqlens, ppo.length_adaptive_alpha)
    return compute_targets(
        batch,
        Scores(case.old, case.values[:num_critics], case.reference),
        advantage=ppo.advantage,
        gamma=ppo.gamma,
        lam=lam,
        critic_lam=ppo.critic_lam,
        value_aggregate=ppo.value_aggregate,
        k=ppo.advantage_mask_fraction,
        h=ppo.entropy_mask_fraction,
        kl_coef=ppo.kl.coef if ppo.kl.where == "reward" else 0.0,
        kl_kind=ppo.kl.kind,
    )


def loss_of(case: Case, ppo: PPOConfig, targets: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and its gradient in the logprobs, as the actor puts them together."""
    new = case.new.clone().requires_grad_()
    batch = case.batch
    mask, cu = batch.loss_mask, batch.cu_seqlens
    clip: tuple[Any, Any] = (ppo.clip_low, ppo.clip_high)
    if ppo.high_entropy_clip is not None:
        wide = {"high_entropy": ppo.high_entropy_clip, "fraction": ppo.high_entropy_fraction}
        clip = tuple(high_entropy_clip(case.entropies, mask, cu, clip=c, **wide) for c in clip)
    norm = float(LONGEST) if ppo.aggregation.endswith("norm") else None
    total, count = policy_loss(
        new, case.entropies, targets.old_logprobs, targets.advantages, mask, cu, kind=ppo.loss,
        advantage_mask=targets.advantage_mask, entropy_mask=targets.entropy_mask, entropy_coef=ppo.entropy_coef,
        clip_low=clip[0], clip_high=clip[1], dual_clip=ppo.dual_clip, aggregation=ppo.aggregation, length_norm=norm,
        negative_scale=ppo.negative_scale,
    )  # fmt: skip
    loss = total / count
    if ppo.kl.coef and ppo.kl.where == "loss":
        total, count = kl_loss(new, case.reference, mask, cu, kind=ppo.kl.kind, aggregation=ppo.aggregation)
        loss = loss + ppo.kl.coef * total / count
    if ppo.positive_nll_coef:
        positive = (batch.rewards > 0)[token_sequences(mask, cu)]
        total, count = positive_nll_loss(new, positive, mask)
        loss = loss + ppo.positive_nll_coef * total / count
    (gradient,) = torch.autograd.grad(loss, new)
    return loss.detach(), gradient


# --- the papers' advantages, per token in Python floats


def group_advantage(how: str) -> list[float]:
    """Of every response, from the rewards of its group."""
    found = []
    for n, reward in enumerate(REWARDS):
        group = [r for r, g in zip(REWARDS, GROUPS, strict=True) if g == GROUPS[n]]
        if how == "rloo":
            found.append(reward - (sum(group) - reward) / (len(group) - 1))
        else:
            scale = statistics.stdev(group) + 1e-6 if how == "grpo" else 1.0
            found.append((reward - statistics.mean(group)) / scale)
    return found


def gae_by_definition(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """sum over l of (gamma lambda)^l delta_{t+l}, V = 0 after the last token."""
    following = [*values[1:], 0.0]
    delta = [r + gamma * w - v for r, w, v in zip(rewards, following, values, strict=True)]
    return [sum((gamma * lam) ** (u - t) * delta[u] for u in range(t, len(delta))) for t in range(len(delta))]


def expected_advantages(case: Case, method: str) -> torch.Tensor:
    found = torch.zeros(sum(SIZES), dtype=F64)
    how = {"dr_grpo": "dr_grpo", "rloo": "rloo"}.get(method, "grpo")
    is_gae = method in ("asyppo", "ppo", "symmetric_ppo", "naive_ensemble", "vapo")
    for n, tokens in enumerate(case.responses):
        if not is_gae:
            found[tokens] = group_advantage(how)[n]
            continue
        critics = case.values if method in ("asyppo", "naive_ensemble") else case.values[:1]
        values = [float(sum(v[t] for v in critics) / len(critics)) for t in tokens]
        lam = max(0.0, 1 - 1 / (0.05 * len(tokens))) if method == "vapo" else 1.0
        rewards = [0.0] * (len(tokens) - 1) + [REWARDS[n]]
        found[tokens] = torch.tensor(gae_by_definition(rewards, values, 1.0, lam), dtype=F64)
    return found


# --- the papers' losses, per token with autograd


def clipped(ratio: torch.Tensor, a: float, low: float, high: float) -> torch.Tensor:
    return torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)


def token_objective(method: str, case: Case, new: torch.Tensor, tokens: list[int], t: int, a: float) -> torch.Tensor:
    """What is maximised at token t of a response."""
    ratio = torch.exp(new[t] - case.old[t])
    if method == "gspo":
        return clipped(torch.exp((new[tokens] - case.old[tokens]).mean()), a, 3e-4, 4e-4)
    if method == "cispo":
        return ratio.detach().clamp(max=1.28) * a * new[t]
    if method == "asympo":
        return a * new[t] / -new[tokens].mean().detach()
    if method == "spo":
        return (a if a >= 0 else 0.5 * a) * new[t]
    if method == "aspo":
        wide = sorted(tokens, key=lambda u: -case.entropies[u])[: math.floor(0.2 * len(tokens) + 1e-9)]
        return aspo_objective(ratio, new[t], a, 0.4 if t in wide else 0.2)
    high = 0.28 if method in ("dapo", "vapo") else 0.2
    return clipped(ratio, a, 0.2, high)


def aspo_objective(ratio: torch.Tensor, logprob: torch.Tensor, a: float, eps: float) -> torch.Tensor:
    r = float(ratio.detach())
    if a < 0:
        if r > 3:
            return 3 * a * logprob
        return torch.clamp(ratio, min=1 - eps) * a
    if r > 1 + eps:
        return 0 * ratio
    if 1 / r > 3:
        return 3 * a * logprob
    return ratio / r**2 * a


def expected_loss(case: Case, method: str, advantages: torch.Tensor, masks: Any) -> tuple[torch.Tensor, torch.Tensor]:
    new = case.new.clone().requires_grad_()
    sums = []
    for tokens in case.responses:
        terms = []
        for t in tokens:
            objective = token_objective(method, case, new, tokens, t, float(advantages[t]))
            if method == "asyppo":
                objective = objective * float(masks[0][t]) + 0.01 * case.entropies[t] * float(masks[1][t])
            terms.append(objective)
        sums.append(torch.stack(terms).sum())
    count = sum(len(tokens) for tokens in case.responses)
    if method in ("rloo", "dapo", "cispo", "vapo", "aspo"):
        loss = -sum(sums) / count
    elif method == "dr_grpo":
        loss = -sum(sums) / LONGEST / len(sums)
    else:
        loss = -sum(s / len(tokens) for s, tokens in zip(sums, case.responses, strict=True)) / len(sums)
    if method == "vapo":
        right = [t for tokens, reward in zip(case.responses, REWARDS, strict=True) if reward > 0 for t in tokens]
        loss = loss - 0.1 * sum(new[t] for t in right) / len(right)
    (gradient,) = torch.autograd.grad(loss, new)
    return loss.detach(), gradient


def expected_masks(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """I_A and I_H of two critics with k = h = 0.2: sigma is half their difference."""
    tokens = [t for response in case.responses for t in response]
    ascending = sorted(tokens, key=lambda t: abs(float(case.values[0][t] - case.values[1][t])))
    cut = math.floor(0.2 * len(tokens) + 1e-9)
    masks = torch.zeros(2, sum(SIZES), dtype=torch.bool)
    masks[0, ascending[cut:]] = True
    masks[1, ascending[: len(tokens) - cut]] = True
    return masks[0], masks[1]


def critics_of(method: str) -> int:
    uses = METHODS[method][0]
    return 2 if uses is None else uses


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("method", ALL)
def test_a_methods_advantages_are_the_papers(method: str, seed: int):
    case = Case(seed)
    targets = targets_of(case, settings(method), critics_of(method))
    tolerance = 1e-7 if method == "vapo" else 1e-12  # its lambda is a float32
    expected = expected_advantages(case, method)
    torch.testing.assert_close(targets.advantages, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("method", ALL)
def test_a_methods_loss_and_gradient_are_the_papers(method: str, seed: int):
    case = Case(seed)
    ppo = settings(method)
    targets = targets_of(case, ppo, critics_of(method))
    loss, gradient = loss_of(case, ppo, targets)
    expected, expected_gradient = expected_loss(case, method, targets.advantages, expected_masks(case))
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-13)
    assert gradient.abs().max() > 1e-3


def test_vapos_critic_is_trained_towards_the_monte_carlo_return():
    case = Case()
    returns = targets_of(case, settings("vapo"), 1).returns
    for tokens, reward in zip(case.responses, REWARDS, strict=True):
        torch.testing.assert_close(returns[tokens], torch.full((len(tokens),), reward, dtype=F64), rtol=0, atol=1e-12)


def test_aspo_is_grpo_on_policy():
    case = Case()
    case.new = case.old.clone()
    advantages = targets_of(case, settings("grpo"), 0)
    aspo = loss_of(case, settings("aspo"), advantages)
    grpo = loss_of(case, settings("grpo", aggregation="token-mean"), advantages)
    torch.testing.assert_close(aspo[0], grpo[0], rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(aspo[1], grpo[1], rtol=1e-13, atol=1e-16)


def test_dapo_without_its_options_is_grpo_with_a_token_mean():
    case = Case()
    plain, mean = settings("dapo", clip_high=0.2), settings("grpo", aggregation="token-mean")
    assert plain == mean
    targets = targets_of(case, plain, 0), targets_of(case, mean, 0)
    for a, b in zip(loss_of(case, plain, targets[0]), loss_of(case, mean, targets[1]), strict=True):
        assert torch.equal(a, b)


def test_asympos_value_is_zero_and_its_gradient_is_not():
    case = Case()
    loss, gradient = loss_of(case, settings("asympo"), targets_of(case, settings("asympo"), 0))
    assert abs(float(loss)) < 1e-14
    assert gradient[case.batch.loss_mask].abs().min() > 1e-4


def test_symmetric_ppo_differs_from_ppo_in_the_critics_model_alone():
    assert settings("symmetric_ppo") == settings("ppo")


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_a_kl_term_in_the_loss_is_its_estimator_with_its_gradient(kind: str, aggregation: str):
    case = Case()
    ppo = settings("grpo", kl={"coef": 0.3, "kind": kind}, aggregation=aggregation)
    targets = targets_of(case, ppo, 0)
    plain, plain_gradient = loss_of(case, settings("grpo", aggregation=aggregation), targets)
    loss, gradient = loss_of(case, ppo, targets)
    new = case.new.clone().requires_grad_()
    d = new - case.reference
    estimate = {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d}[kind]
    if aggregation == "token-mean":
        wanted = estimate[case.batch.loss_mask].mean()
    else:
        wanted = torch.stack([estimate[tokens].mean() for tokens in case.responses]).mean()
    (wanted_gradient,) = torch.autograd.grad(wanted, new)
    torch.testing.assert_close(loss - plain, 0.3 * wanted.detach(), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(gradient - plain_gradient, 0.3 * wanted_gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("method", ["ppo", "grpo", "rloo"])
def test_a_kl_term_in_the_reward_is_taken_off_every_token(kind: str, method: str):
    case = Case()
    ppo = settings(method, kl={"coef": 0.2, "kind": kind, "where": "reward"})
    found = targets_of(case, ppo, critics_of(method)).advantages
    d = case.old - case.reference
    penalty = 0.2 * {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d}[kind]
    totals = [r - float(penalty[t].sum()) for r, t in zip(REWARDS, case.responses, strict=True)]
    for n, tokens in enumerate(case.responses):
        if method == "ppo":
            rewards = [-float(penalty[t]) for t in tokens]
            rewards[-1] += REWARDS[n]
            wanted = gae_by_definition(rewards, [float(case.values[0][t]) for t in tokens], 1.0, 1.0)
        else:
            group = [r for r, g in zip(totals, GROUPS, strict=True) if g == GROUPS[n]]
            others = (sum(group) - totals[n]) / (len(group) - 1)
            scaled = (totals[n] - statistics.mean(group)) / (statistics.stdev(group) + 1e-6)
            wanted = [totals[n] - others if method == "rloo" else scaled] * len(tokens)
        torch.testing.assert_close(found[tokens], torch.tensor(wanted, dtype=F64), rtol=1e-10, atol=1e-12)


def test_the_positive_example_loss_counts_the_tokens_of_positive_responses_alone():
    logprobs = torch.tensor([-1.0, -2.0, torch.nan, -4.0, -5.0], dtype=F64, requires_grad=True)
    positive, mask = torch.tensor([1, 1, 1, 0, 0]).bool(), torch.tensor([1, 1, 0, 1, 1]).bool()
    total, count = positive_nll_loss(logprobs, positive, mask)
    total.backward()
    assert (float(total.detach()), int(count)) == (3.0, 2)
    assert logprobs.grad.tolist() == [-1, -1, 0, 0, 0]
    total, count = positive_nll_loss(logprobs, ~positive & mask & False, mask)
    assert (float(total.detach()), int(count)) == (0.0, 0)


def test_first_and_last_tokens_are_those_of_each_response():
    case = Case()
    first, last = first_and_last(case.batch.loss_mask, case.batch.cu_seqlens)
    assert first.nonzero().flatten().tolist() == [tokens[0] for tokens in case.responses]
    assert last.nonzero().flatten().tolist() == [tokens[-1] for tokens in case.responses]
    mask, cu = torch.tensor([0, 1, 0, 0, 0, 1, 1]).bool(), torch.tensor([0, 3, 5, 5, 7])
    first, last = first_and_last(mask, cu)
    assert (first.nonzero().flatten().tolist(), last.nonzero().flatten().tolist()) == ([1, 5], [1, 6])
    empty = first_and_last(mask[:0], torch.tensor([0, 0]))
    assert empty[0].numel() == empty[1].numel() == 0
