"""Where Triton can run, the kernels are what `choose` hands out when asked."""

from __future__ import annotations

import torch

from asyppo_megatron.kernels.logprob_entropy import logprob_entropy
from asyppo_megatron.kernels.policy import choose


def test_kernels_are_chosen_and_take_every_kind_of_loss(device):
    operators = choose(device, "triton")
    assert operators.name == "triton" and operators.logprob_entropy is logprob_entropy
    new = -torch.rand(6, device=device)
    mask = torch.ones(6, dtype=torch.bool, device=device)
    cu_seqlens = torch.tensor([0, 2, 6], dtype=torch.int32)
    arguments = (new, torch.rand(6, device=device), new - 0.1, torch.randn(6, device=device), mask, cu_seqlens)
    for kind in ("ppo", "gspo", "cispo", "aspo", "asympo", "spo"):
        found = operators.policy_loss(*arguments, kind=kind, entropy_coef=0.01)
        expected = choose(device, "reference").policy_loss(*arguments, kind=kind, entropy_coef=0.01)
        torch.testing.assert_close(found.sum, expected.sum)
        torch.testing.assert_close(found.metrics, expected.metrics, rtol=1e-5, atol=1e-6)
