"""From a batch and its scores to what the roles train towards: the same bits on every rank of a step."""

from __future__ import annotations

from collections.abc import Callable

import torch

from asyppo_megatron.ppo.advantages import GROUP_ADVANTAGES, gae, group_advantages, terminal_rewards
from asyppo_megatron.ppo.ensemble import uncertainty_masks, value_std
from asyppo_megatron.ppo.ensemble_gae import EnsembleGAE, ensemble_gae
from asyppo_megatron.ppo.kl import MAX_LOG_RATIO, kl_estimate
from asyppo_megatron.ppo.segments import segment_sum, token_sequences, zero_outside
from asyppo_megatron.types import PackedBatch, Scores, Targets

ADVANTAGES = ("gae", *GROUP_ADVANTAGES)
IMPORTANCES = ("none", "truncated", "masked")
OLD_LOGPROBS = ("recomputed", "rollout")

# `ensemble_gae`, or what computes the same.
Estimate = Callable[..., EnsembleGAE]

# Elements of a tensor that one step of the checksum widens to int64: a core's cache holds them.
_CHECKSUM_CHUNK = 1 << 18
# Mixes the tensors' sums, so that swapping two of them shows.
_CHECKSUM_FACTOR = 0x9E3779B97F4A7C15 - (1 << 64)


def compute_targets(
    batch: PackedBatch,
    scores: Scores,
    *,
    advantage: str = "gae",
    gamma: float = 1.0,
    lam: float | torch.Tensor = 1.0,
    critic_lam: float | None = None,
    value_aggregate: str = "mean",
    k: float = 0.0,
    h: float = 0.0,
    whiten: bool = False,
    old_from: str = "recomputed",
    importance: str = "none",
    importance_cap: float = 2.0,
    kl_coef: float = 0.0,
    kl_kind: str = "k1",
    estimate: Estimate = ensemble_gae,
) -> Targets:
    """Advantages, returns and masks of a step (arXiv 2510.01656, Eq. 3-5, Algorithm 1 lines 5-6).

    Args:
        batch: the step's trajectories.
        scores: what the roles said about them.
        advantage: "gae" on the critics' aggregated value, or "grpo", "dr_grpo", "rloo" within groups.
        gamma: discount factor.
        lam: lambda of GAE, or one for each trajectory, f32 [N].
        critic_lam: lambda of `returns` where it differs (VAPO's decoupled lambda); `lam` by default.
        value_aggregate: "mean" or "min" over the critics.
        k: fraction of tokens whose advantage is masked; needs critics.
        h: fraction of tokens whose entropy bonus is masked; needs critics.
        whiten: shift and scale the advantages to mean 0 and deviation 1 over all trainable tokens.
        old_from: whose logprobs the policy's ratio starts from: "recomputed" (`scores.old_logprobs`), or "rollout" (the
            batch's, of the weights that sampled: then the ratio carries the mismatch, and no weight is applied).
        importance: weight on A for the mismatch of engine and trainer, w = exp(old - rollout logprob):
            "none", "truncated" (min(w, cap), TIS) or "masked" (w where w <= cap, else 0, MIS).
        importance_cap: cap of w.
        kl_coef: times the KL estimate to the reference, taken off every token's reward.
        kl_kind: its estimator, see `kl.kl_estimate`.
        estimate: computes what `ensemble_gae` here does; on every rank the same one.

    Returns:
        `Targets`, 0 and false outside `loss_mask`. Its metrics are f32, 0-dim; a batch without a trainable
        token gives zeros.
    """
    if advantage not in ADVANTAGES:
        raise ValueError(f"advantage: got {advantage!r}, need one of {', '.join(ADVANTAGES)}")
    mask = batch.loss_mask
    recomputed = zero_outside(scores.old_logprobs, mask)
    rollout = zero_outside(batch.rollout_logprobs, mask, recomputed.dtype)
    old = _old_logprobs(recomputed, rollout, old_from, importance)
    reference = None if scores.reference_logprobs is None else zero_outside(scores.reference_logprobs, mask)
    rewards = _token_rewards(batch, old, reference, kl_coef, kl_kind)
    if advantage == "gae":
        found = _critic_advantages(batch, scores, rewards, gamma, lam, critic_lam, value_aggregate, estimate)
        advantages, returns, std = found.advantages, found.returns, found.std
    else:
        advantages, returns = _group_relative_advantages(batch, rewards, gamma, advantage)
        std = _disagreement(scores.values, mask)
    if whiten:
        advantages = whitened(advantages, mask)
    # Held within the bound of the losses' ratios, so that one broken score cannot make every metric infinite.
    mismatch = (recomputed - rollout).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    advantages = _weighted(advantages, mismatch, importance, importance_cap)
    if scores.values.shape[0] == 0 and (k > 0 or h > 0):
        raise ValueError(f"masks k = {k}, h = {h}: got no critic's values, need critics that can disagree")
    advantage_mask, entropy_mask = uncertainty_masks(std, mask, k=k, h=h)
    metrics = _batch_metrics(std, advantages, returns, mask, advantage_mask, entropy_mask)
    return Targets(
        old_logprobs=old,
        advantages=advantages,
        returns=returns,
        advantage_mask=advantage_mask,
        entropy_mask=entropy_mask,
        reference_logprobs=reference,
        metrics=metrics | _mismatch_metrics(mismatch, mask),
    )


def batch_rewards(batch: PackedBatch) -> torch.Tensor:
    """The terminal reward of every trajectory and, where there are any, the dense ones, f32 [T]."""
    rewards = terminal_rewards(batch.rewards, batch.loss_mask, batch.cu_seqlens)
    if batch.token_rewards is None:
        return rewards
    return rewards + zero_outside(batch.token_rewards, batch.loss_mask, rewards.dtype)


def _old_logprobs(recomputed: torch.Tensor, rollout: torch.Tensor, source: str, importance: str) -> torch.Tensor:
    """The logprobs that the policy's ratio starts from, [T]."""
    if source not in OLD_LOGPROBS:
        raise ValueError(f"old_from: got {source!r}, need one of {', '.join(OLD_LOGPROBS)}")
    if source == "recomputed":
        return recomputed
    if importance != "none":
        raise ValueError(f"importance: got {importance!r} with old_from rollout, whose ratio carries it; need none")
    return rollout


def _token_rewards(
    batch: PackedBatch, old: torch.Tensor, reference: torch.Tensor | None, kl_coef: float, kl_kind: str
) -> torch.Tensor:
    """Terminal and dense rewards, less the KL penalty at every trainable token, f32 [T]."""
    rewards = batch_rewards(batch)
    if kl_coef == 0.0:
        return rewards
    if reference is None:
        raise ValueError(f"reference_logprobs: got None, need f32 [T] with kl_coef {kl_coef}; add a reference role")
    return rewards - kl_coef * kl_estimate(old, reference, kl_kind)


def _critic_advantages(
    batch: PackedBatch,
    scores: Scores,
    rewards: torch.Tensor,
    gamma: float,
    lam: float | torch.Tensor,
    critic_lam: float | None,
    value_aggregate: str,
    estimate: Estimate,
) -> EnsembleGAE:
    """GAE on the corrected value (Eq. 3); returns under `critic_lam` where that is given."""
    if scores.values.shape[0] == 0:
        raise ValueError("advantage gae: got no critic's values, need at least one critic; or use grpo, dr_grpo, rloo")
    inputs = (scores.values, rewards, batch.loss_mask, batch.cu_seqlens)
    found = estimate(*inputs, gamma=gamma, lam=lam, how=value_aggregate)
    if critic_lam is not None:
        found = found._replace(returns=estimate(*inputs, gamma=gamma, lam=critic_lam, how=value_aggregate).returns)
    return found


def _group_relative_advantages(
    batch: PackedBatch, rewards: torch.Tensor, gamma: float, how: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """One advantage a trajectory, of its total reward within its group, at every trainable token."""
    sequences = token_sequences(batch.loss_mask, batch.cu_seqlens)
    totals = segment_sum(rewards, sequences, batch.num_trajectories)
    advantages = group_advantages(totals, batch.group_ids, how)[sequences]
    return zero_outside(advantages, batch.loss_mask), _discounted(batch, rewards, gamma)


def _discounted(batch: PackedBatch, rewards: torch.Tensor, gamma: float) -> torch.Tensor:
    """Discounted sum of the rewards from each trainable token on, [T]."""
    return gae(rewards, torch.zeros_like(rewards), batch.loss_mask, batch.cu_seqlens, gamma=gamma, lam=1.0)[1]


def monte_carlo_returns(batch: PackedBatch, gamma: float) -> torch.Tensor:
    """The target of the critics in the paper's order (Eq. 2): R_t = gamma^(tokens left) x terminal reward.

    Dense rewards (appendix D) add theirs, each discounted by the tokens until it comes.

    Returns:
        f32 [T]; 0 outside `loss_mask`.
    """
    return _discounted(batch, batch_rewards(batch), gamma)


def whitened(advantages: torch.Tensor, loss_mask: torch.Tensor) -> torch.Tensor:
    """(A - mean) / (std + 1e-8) over the trainable tokens, [T]."""
    mean, std = _mean_and_std(advantages, loss_mask)
    return zero_outside((advantages - mean) / (std + 1e-8), loss_mask)


def _weighted(advantages: torch.Tensor, mismatch: torch.Tensor, importance: str, cap: float) -> torch.Tensor:
    """Advantages times the truncated or masked weight exp(mismatch), [T]."""
    if importance not in IMPORTANCES:
        raise ValueError(f"importance: got {importance!r}, need one of {', '.join(IMPORTANCES)}")
    if importance == "none":
        return advantages
    weight = mismatch.exp()
    if importance == "truncated":
        return advantages * weight.clamp(max=cap)
    return advantages * torch.where(weight <= cap, weight, 0.0)


def _disagreement(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """sigma, f32 [T]; 0 without critics."""
    return value_std(values) if values.shape[0] else torch.zeros(mask.shape, device=mask.device)


def _mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of `x` over `mask`, f32 0-dim; 0 where the mask is empty."""
    return zero_outside(x, mask).sum() / mask.sum().clamp(min=1)


def _mean_and_std(x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and population standard deviation of `x` over `mask`, f32 0-dim; 0 where the mask is empty."""
    count = mask.sum().clamp(min=1)
    mean = _mean(x, mask)
    return mean, (zero_outside(x - mean, mask).square().sum() / count).sqrt()


def _batch_metrics(
    std: torch.Tensor,
    advantages: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    advantage_mask: torch.Tensor,
    entropy_mask: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """What the critics and the advantages looked like over the trainable tokens."""
    count = mask.sum()
    mean, deviation = _mean_and_std(advantages, mask)
    return {
        "value_std": _mean(std, mask),
        "advantage_mean": mean,
        "advantage_std": deviation,
        "return_mean": _mean(returns, mask),
        "masked_advantage_fraction": (count - advantage_mask.sum()) / count.clamp(min=1),
        "masked_entropy_fraction": (count - entropy_mask.sum()) / count.clamp(min=1),
    }


def _mismatch_metrics(mismatch: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """How far the engine's logprobs are from the trainer's, of the same weights or of staler ones.

    "mismatch_k3_kl" estimates KL(engine || trainer); "mismatch_ess" is the effective sample size of the
    weights w, (sum w)^2 / (n sum w^2), 1 where engine and trainer agree.

    Args:
        mismatch: f32 [T], old_logprobs - rollout_logprobs, nats; 0 outside `mask`.
        mask: bool [T].
    """
    count = mask.sum().clamp(min=1)
    size = mismatch.abs()
    weight = zero_outside(mismatch.exp(), mask)
    total, squares = weight.sum(), weight.square().sum()
    return {
        "mismatch_mean": size.sum() / count,
        "mismatch_max": size.amax() if size.numel() else torch.zeros((), device=size.device),
        "mismatch_k3_kl": (torch.expm1(mismatch) - mismatch).sum() / count,
        "mismatch_ess": torch.where(squares > 0, total.square() / (count * squares), 0.0),
    }


def checksum(targets: Targets) -> torch.Tensor:
    """A fingerprint of the tensors' bits, equal on ranks that computed the same targets.

    The sum over elements of (their bits as an integer) x (an odd weight of their position), modulo
    2^64: integer additions, so neither the device nor the order of its threads matters. Metrics are left out.

    Returns:
        i64, 0-dim.
    """
    tensors = [
        targets.old_logprobs,
        targets.advantages,
        targets.returns,
        targets.advantage_mask,
        targets.entropy_mask,
        targets.reference_logprobs,
    ]
    total = torch.zeros((), dtype=torch.long, device=targets.advantages.device)
    for tensor in tensors:
        total = total * _CHECKSUM_FACTOR
        if tensor is None:
            continue
        bits = tensor.contiguous().view(torch.uint8 if tensor.dtype == torch.bool else torch.int32)
        for start in range(0, bits.numel(), _CHECKSUM_CHUNK):
            chunk = bits[start : start + _CHECKSUM_CHUNK]
            weight = torch.arange(2 * start + 1, 2 * (start + chunk.numel()), 2, device=bits.device)
            total = total + (weight * chunk).sum()
    return total


def explained_variance_sums(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The sums that `explained_variance` needs; add them up over ranks and micro-batches.

    Args:
        values: f32 [T].
        returns: f32 [T].
        mask: bool [T].

    Returns:
        f64 [5]: count, sum R, sum R^2, sum e, sum e^2 with e = R - V.
    """
    target = zero_outside(returns, mask, torch.float64)
    error = target - zero_outside(values, mask, torch.float64)
    return torch.stack(
        [mask.sum(dtype=torch.float64), target.sum(), target.square().sum(), error.sum(), error.square().sum()]
    )


def explained_variance(sums: torch.Tensor) -> torch.Tensor:
    """1 - Var(R - V) / Var(R): 1 is a perfect critic, 0 one no better than a constant.

    Returns:
        f64, 0-dim; NaN where the returns do not vary, since there is nothing to explain.
    """
    count = sums[0]
    return_variance = sums[2] / count - (sums[1] / count).square()
    error_variance = sums[4] / count - (sums[3] / count).square()
    # Rounding leaves a constant return with a variance of this relative size.
    varies = return_variance > 1e-12 * (sums[2] / count)
    return torch.where(varies, 1.0 - error_variance / return_variance, torch.nan)
