"""The ensemble's corrected value, its GAE and the critics' disagreement: the plain-torch reference of the kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch

from asyppo_megatron.ppo.advantages import gae
from asyppo_megatron.ppo.ensemble import aggregate_values, value_std
from asyppo_megatron.ppo.segments import zero_outside


class EnsembleGAE(NamedTuple):
    """Attributes:
    advantages: f32 [T], 0 outside the loss mask, as all of these.
    returns: f32 [T].
    mean: f32 [T], the aggregated value (Eq. 3).
    std: f32 [T], population standard deviation over the critics.
    """

    advantages: torch.Tensor
    returns: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor


def ensemble_gae(
    values: torch.Tensor,
    token_rewards: torch.Tensor,
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    gamma: float = 1.0,
    lam: float | torch.Tensor = 1.0,
    how: str = "mean",
) -> EnsembleGAE:
    """Corrected value, its GAE and the critics' disagreement (arXiv 2510.01656, Eq. 3, 4).

    Args:
        values: f32 [M, T], M >= 1.
        token_rewards: f32 [T].
        loss_mask: bool [T].
        cu_seqlens: i32 [N + 1].
        gamma: discount factor.
        lam: lambda, or f32 [N], one for each sequence.
        how: "mean" or "min" over the critics.
    """
    mean = aggregate_values(values, how)
    advantages, returns = gae(token_rewards, mean, loss_mask, cu_seqlens, gamma=gamma, lam=lam)
    return EnsembleGAE(advantages, returns, zero_outside(mean, loss_mask), zero_outside(value_std(values), loss_mask))
