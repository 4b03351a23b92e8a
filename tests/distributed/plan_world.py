"""What the ranks of test_plan_memory.py do: build real roles and count their bytes. Not a test file."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Case:
    """One role on four ranks."""

    family: str
    tied: bool
    precision: str
    tp: int
    pp: int
    role: str = "actor"
    distributed: bool = True

    @property
    def name(self) -> str:
        tied = "tied" if self.tied else "untied"
        sharded = "" if self.distributed else "-whole"
        return f"{self.family}-{tied}-{self.precision}-tp{self.tp}-pp{self.pp}-{self.role}{sharded}"


def spec_and_config(case: Case) -> tuple[Any, Any]:
    """A tiny architecture with an odd vocabulary, and a role of it."""
    from asyppo_megatron.config import RoleConfig
    from asyppo_megatron.models.spec import ModelSpec

    path = ROOT / "model_configs/tiny.yaml"
    tree = yaml.safe_load(path.read_text())["architecture"]
    architecture = {"qwen3": "Qwen3ForCausalLM", "qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}[case.family]
    tree |= {"architectures": [architecture], "tie_word_embeddings": case.tied, "vocab_size": 509}
    tree |= {"num_hidden_layers": 4, "num_key_value_heads": 4}
    config = RoleConfig(
        model=path, ranks=(0, 1, 2, 3), precision=case.precision, layout={"tp": case.tp, "pp": case.pp},
        optimizer={"distributed": case.distributed},
    )  # fmt: skip
    return ModelSpec.from_architecture(tree, path), config


def count_bytes(case: Case, directory: Path, registry: Any, ranks: int) -> dict[str, Any]:
    """Bytes of this rank's weights, gradients and optimizer state, counted on the real thing."""
    from asyppo_megatron.parallel.layout import ParallelLayout
    from asyppo_megatron.parallel.process_groups import build_groups
    from asyppo_megatron.roles.role import Role

    spec, config = spec_and_config(case)
    groups = build_groups(ParallelLayout(config.ranks, case.tp, case.pp), registry)
    role = Role(case.role, config, spec, groups, value_head=case.role == "critic", total_updates=1)
    role.prepare_state()
    buffers = role.ddp.buffers
    weights = sum(_bytes(b.param_data) for b in buffers if b.param_data is not None)
    weights = weights or sum(_bytes(p) for p in role.module.parameters())
    moments, mains = 0, 0
    for optimizer in getattr(role.optimizer, "chained_optimizers", [role.optimizer]):
        inner = optimizer.optimizer
        moments += sum(_bytes(s[k]) for s in inner.state.values() for k in ("exp_avg", "exp_avg_sq"))
        if case.precision == "bf16":
            mains += sum(_bytes(p) for g in inner.param_groups for p in g["params"])
    found = {
        "at": groups.at, "parameters": weights, "gradients": sum(_bytes(b.grad_data) for b in buffers),
        "optimizer": moments + mains,
    }  # fmt: skip
    del role, buffers
    gc.collect()
    return found


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def peak_of_update(rank: int, ranks: int, directory: Path, tokens: int, recompute: str, length: int) -> tuple[int, int]:
    """Peak live tensor bytes of building a model, two updates of one micro-batch; and what plan says."""
    from torch.profiler import profile

    from asyppo_megatron.config import ActorConfig
    from asyppo_megatron.models.spec import ModelSpec
    from asyppo_megatron.packing import plan_micro_batches
    from asyppo_megatron.parallel.layout import ParallelLayout
    from asyppo_megatron.parallel.process_groups import GroupRegistry, build_groups
    from asyppo_megatron.plan.memory import RoleMemory, activation_bytes, logits_bytes, step_bytes
    from asyppo_megatron.plan.parameters import state_bytes
    from asyppo_megatron.ppo.logprob import logprob_entropy
    from asyppo_megatron.roles.role import Role
    from asyppo_megatron.roles.runner import make_pack

    path = ROOT / "model_configs/qwen3_0.6b.yaml"
    tree = yaml.safe_load(path.read_text())["architecture"] | {"num_hidden_layers": 5, "vocab_size": 8192}
    spec = ModelSpec.from_architecture(tree, path)
    config = ActorConfig(model=path, precision="fp32", recompute=recompute)
    groups = build_groups(ParallelLayout((0,)), GroupRegistry())
    cu_seqlens = torch.arange(0, tokens + 1, length, dtype=torch.int32)
    ids = torch.randint(0, spec.vocab_size, (tokens,), dtype=torch.int32)
    plans = plan_micro_batches(
        cu_seqlens, torch.arange(len(cu_seqlens) - 1), dp_size=1, max_tokens=tokens, multiple=1, fixed_size=False
    )
    with profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        role = Role("actor", config, spec, groups, value_head=False, total_updates=1)
        with torch.no_grad():
            for p in role.module.parameters():
                p.normal_(std=0.02)
        role.weights_changed()
        packs = [make_pack(p, ids) for p in plans[0]]
        assert len(packs) == 1

        def loss(out: torch.Tensor, pack: Any) -> tuple[torch.Tensor, None]:
            logprobs, entropies = logprob_entropy(out.squeeze(0), pack.tokens[0])
            return (logprobs + 0.01 * entropies).mean(), None

        for _ in range(2):  # the optimizer's state is there from the first step on
            role.accumulate(packs, loss)
            role.step()
    live = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    state = state_bytes(spec, "actor", config, 0)[0]
    logits = logits_bytes(spec, config, tokens, chunk=None)
    return peak, RoleMemory(
        "actor", 0, state, activation_bytes(spec, config, tokens), logits, step_bytes(config, state)
    ).total
