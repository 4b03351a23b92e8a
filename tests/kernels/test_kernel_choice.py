"""The one choice between kernels and plain torch, and what it says where kernels cannot run."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import replace

import pytest
import torch

from asyppo_megatron.kernels import policy
from asyppo_megatron.kernels.policy import choose
from asyppo_megatron.ppo.logprob import logprob_entropy
from asyppo_megatron.roles.policy_head import report_operators


def test_a_cpu_runs_the_reference_and_says_nothing(caplog):
    with caplog.at_level(logging.INFO):
        operators = choose("cpu")
    assert operators.name == "reference" and operators.logprob_entropy is logprob_entropy
    assert not caplog.records


def test_an_override_is_logged(caplog):
    with caplog.at_level(logging.INFO):
        assert choose(torch.device("cuda"), "reference").name == "reference"
    assert "operators on cuda: reference, as the configuration says (the rule says triton)" in caplog.text


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="need one of auto, triton, reference"):
        choose("cpu", "cuda")


def test_kernels_without_triton_are_refused_with_a_way_out(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(policy.importlib.util, "find_spec", lambda name: None if name == "triton" else found(name))
    with pytest.raises(ValueError, match="Triton is not installed.*set kernels to reference"):
        choose("cuda")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton not installed")
def test_kernels_on_a_cpu_are_refused_with_a_way_out(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="got device cpu, need cuda"):
        choose("cpu", "triton")


@pytest.mark.parametrize(("name", "kind", "says"), [("triton", "gspo", True), ("triton", "ppo", False),
                                                    ("reference", "gspo", False)])  # fmt: skip
def test_a_loss_without_a_kernel_is_named(name, kind, says, caplog):
    with caplog.at_level(logging.INFO):
        report_operators("actor", replace(choose("cpu"), name=name), kind, fused=False)
    assert (f"policy loss {kind} has no kernel" in caplog.text) == says
    assert f"actor: operators {name}, logits head" in caplog.text
