"""Two faults of Megatron's distributed optimizer around torch's AdamW, mended in one place.

torch's AdamW keeps `step` in the state of every parameter. Megatron's loader has no such key (KeyError), and
its `load_state_dict` gives all parameters one shared `step` tensor, which AdamW then increments once per
parameter. It matters wherever torch's AdamW runs: on a CPU, and on a GPU without Transformer Engine and apex.
"""

from __future__ import annotations

from typing import Any

import torch

_installed = False


def install() -> None:
    """Keep `step` out of the way while Megatron sets a parameter's optimizer state. Safe to call again."""
    global _installed
    if _installed:
        return
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original = DistributedOptimizer._set_main_param_and_optimizer_states

    def set_states(self: Any, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        group, index = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][index]]
        step = state.pop("step", None)
        original(self, model_param, tensors)
        if step is not None:
            state["step"] = step.clone()

    DistributedOptimizer._set_main_param_and_optimizer_states = set_states
    _installed = True


def torch_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    """The torch optimizers inside a Megatron optimizer."""
    inner = getattr(optimizer, "chained_optimizers", [optimizer])
    return [o.optimizer for o in inner if isinstance(getattr(o, "optimizer", None), torch.optim.AdamW)]


def create_lazy_state(optimizer: Any) -> None:
    """Give AdamW the state that it would create at its first step, so that it can be saved and loaded before."""
    for inner in torch_optimizers(optimizer):
        for group in inner.param_groups:
            for p in group["params"]:
                if not inner.state[p]:
                    inner.state[p].update(
                        step=torch.tensor(0.0), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p)
                    )


def unshare_steps(optimizer: Any) -> None:
    """One `step` tensor for each parameter, after a load."""
    for inner in torch_optimizers(optimizer):
        for state in inner.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()
