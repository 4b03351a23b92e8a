"""Which operators a device runs: the kernels on a GPU, plain torch elsewhere, or what the configuration says."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from asyppo_megatron.kernels import linear_head, reference
from asyppo_megatron.kernels.linear_head import LinearPolicyLoss
from asyppo_megatron.kernels.reference import SEPARABLE, PolicyLoss
from asyppo_megatron.ppo.ensemble_gae import EnsembleGAE
from asyppo_megatron.ppo.ensemble_gae import ensemble_gae as reference_ensemble_gae
from asyppo_megatron.ppo.logprob import logprob_entropy as reference_logprob_entropy

CHOICES = ("auto", "triton", "reference")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Operators:
    """One implementation of every operator that has a kernel.

    Attributes:
        name: "triton" or "reference".
        logprob_entropy: as `ppo.logprob.logprob_entropy`.
        policy_loss: as `kernels.reference.policy_loss`, for any kind.
        ensemble_gae: as `ppo.ensemble_gae.ensemble_gae`.
        linear_policy_loss: as `kernels.linear_head.linear_policy_loss`.
        linear_logprob_entropy: as `kernels.linear_head.linear_logprob_entropy`.
    """

    name: str
    logprob_entropy: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    policy_loss: Callable[..., PolicyLoss]
    ensemble_gae: Callable[..., EnsembleGAE]
    linear_policy_loss: Callable[..., LinearPolicyLoss]
    linear_logprob_entropy: Callable[..., tuple[torch.Tensor, torch.Tensor]]


def choose(device: torch.device | str, override: str = "auto") -> Operators:
    """The operators for a device: kernels on a GPU, plain torch on anything else.

    Args:
        device: where the tensors are.
        override: "auto" for that rule; "triton" or "reference" whatever the device, which is logged.

    Raises:
        ValueError: an unknown choice, or kernels where they cannot run.
    """
    device = torch.device(device)
    name = chosen_name(device.type, override)
    if override != "auto":
        usual = _usual(device.type)
        log.info("operators on %s: %s, as the configuration says (the rule says %s)", device.type, name, usual)
    if name == "reference":
        return Operators(
            name,
            reference_logprob_entropy,
            reference.policy_loss,
            reference_ensemble_gae,
            linear_head.linear_policy_loss,
            linear_head.linear_logprob_entropy,
        )
    from asyppo_megatron.kernels.ensemble_gae import ensemble_gae
    from asyppo_megatron.kernels.linear_policy_loss import linear_logprob_entropy, linear_policy_loss
    from asyppo_megatron.kernels.logprob_entropy import logprob_entropy

    return Operators(name, logprob_entropy, _policy_loss, ensemble_gae, linear_policy_loss, linear_logprob_entropy)


def _usual(device_type: str) -> str:
    return "triton" if device_type == "cuda" else "reference"


def chosen_name(device_type: str, override: str) -> str:
    """The name of what `choose` hands out on a kind of device; its errors are those of `choose`."""
    if override not in CHOICES:
        raise ValueError(f"kernels: got {override!r}, need one of {', '.join(CHOICES)}")
    name = _usual(device_type) if override == "auto" else override
    if name == "triton":
        _check_triton(device_type)
    return name


def _check_triton(device_type: str) -> None:
    """A ValueError with a way out where the kernels cannot run."""
    if importlib.util.find_spec("triton") is None:
        raise ValueError(
            f"kernels on {device_type}: Triton is not installed; install a CUDA build of torch, which brings it, "
            "or set kernels to reference"
        )
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"kernels: got device {device_type}, need cuda (or TRITON_INTERPRET=1 in the environment, for tests); "
            "set kernels to auto or reference"
        )


def _policy_loss(*args: Any, kind: str = "ppo", **options: Any) -> PolicyLoss:
    """The kernel for the kinds whose tokens are independent, plain torch for those that need a whole response."""
    from asyppo_megatron.kernels.policy_loss import policy_loss

    return (policy_loss if kind in SEPARABLE else reference.policy_loss)(*args, kind=kind, **options)
