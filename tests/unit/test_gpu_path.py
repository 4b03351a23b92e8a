"""What of the GPU path can be tested without a GPU: placement, fork safety, and flash attention's call."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from asyppo_megatron.config import ConfigError, load_config
from asyppo_megatron.launch import command
from asyppo_megatron.models.attention import FLASH_MULTIPLE, PackedAttention, packed_seq_params

RECIPES = sorted((Path(__file__).resolve().parents[2] / "model_configs/runs").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid(path: Path):
    assert load_config(path).num_steps > 0


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(command, "check_run", lambda config: None)
    monkeypatch.setattr(command, "configure_logging", lambda directory, process, **options: None)
    monkeypatch.setattr(command, "num_gpus", lambda: 1)
    demo = next(path for path in RECIPES if path.stem == "demo")
    with pytest.raises(ConfigError, match="got 4 on a machine of 1 GPU"):
        command.train_config(load_config(demo))


def test_with_a_gpu_the_launcher_imports_nothing_that_may_start_cuda(tmp_path: Path):
    """Its ranks are forked, and Megatron imports Transformer Engine where that is installed."""
    code = f"""
import sys
from pathlib import Path
from asyppo_megatron import cli, preflight
from asyppo_megatron.launch import local
preflight.check_run = lambda config: None
local.run_ranks = lambda count, main, logs=None, **more: print("ranks", count, "megatron.core" in sys.modules)
from asyppo_megatron.launch import command
command.num_gpus = lambda: 1
sys.exit(cli.main(["train", {str(RECIPES[0].with_name("demo_gpu.yaml"))!r}, "run_dir={tmp_path}"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "ranks 1 False\n"), done.stderr


@pytest.mark.parametrize("head_dim", [16, 12])
def test_flash_attention_gets_padded_heads_and_gives_what_dense_attention_does(
    monkeypatch: pytest.MonkeyPatch, head_dim: int
):
    def flash(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size):
        assert query.size(2) % FLASH_MULTIPLE == 0
        assert query.shape == key.shape == value.shape
        assert (max_q, max_k, window_size) == (5, 5, (-1, 0))
        assert cu_q.dtype == torch.int32
        parts = []
        for start, end in zip(cu_q[:-1].tolist(), cu_k[1:].tolist(), strict=True):
            q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
            parts.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(0, 1))
        return torch.cat(parts)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", flash)
    torch.manual_seed(0)
    params = packed_seq_params(torch.tensor([0, 3, 8], dtype=torch.int32), 8, 5)
    attention = SimpleNamespace(scale=head_dim**-0.5)
    tensors = [torch.randn(8, heads, head_dim, requires_grad=True) for heads in (4, 2, 2)]
    found = PackedAttention._varlen(attention, *tensors, params)
    expected = PackedAttention._dense(attention, *tensors, params.geometry)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(found)
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), tensors),
        torch.autograd.grad((expected * weight).sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
