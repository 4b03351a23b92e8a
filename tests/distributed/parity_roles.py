"""What a rank of the parity tests reads out of a role: gradients and updates by Hugging Face name. Not a test file."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from parity_files import TIED_COPY

from asyppo_megatron.convert.load import stage_entries
from asyppo_megatron.convert.names import named_parameters
from asyppo_megatron.convert.rows import Kind
from asyppo_megatron.convert.shards import merge
from asyppo_megatron.roles.role import Role


def gather(role: Role, read: Callable[[torch.nn.Parameter], torch.Tensor]) -> dict[str, torch.Tensor]:
    """`read` of every parameter of this stage, merged over tp, on each tp rank (replicas: its own)."""
    parameters, group = named_parameters(role.module), role.groups.collection.tp
    result = {}
    for name, entry in stage_entries(role.module, role.spec, "critic" if role.value_head else "actor").items():
        own = read(parameters[name]).detach().contiguous()
        shards = [own]
        if entry.kind is not Kind.REPLICATED and group.size() > 1:
            shards = [torch.empty_like(own) for _ in range(group.size())]
            dist.all_gather(shards, own, group=group)
        is_copy = name == "output_layer.weight" and entry.name != name
        for (hf_name, _), tensor in zip(entry.hf, merge(entry.kind, shards, role.spec), strict=True):
            result[TIED_COPY + hf_name if is_copy else hf_name] = tensor.float().clone()
    return result


def complete_gradients(role: Role) -> None:
    """Gather what the distributed optimizer scattered: each dp rank holds the sum of its part of a bucket only."""
    group = role.groups.collection.dp_cp
    if group.size() == 1 or not role.config.optimizer.distributed:
        return
    for buffer in role.ddp.buffers:
        for bucket in buffer.buckets:
            parts = list(bucket.grad_data.view(group.size(), -1).unbind())
            dist.all_gather(parts, parts[group.rank()].clone(), group=group)


class Watch:
    """Records a role's gradients at its first step, and its weights before and after."""

    def __init__(self, role: Role):
        self.role, self.gradients, self.norms = role, {}, []
        self.dtypes: set[str] = set()
        self.before = gather(role, lambda p: p)
        step = role.step

        def watched() -> tuple[float, float]:
            if not self.gradients:
                complete_gradients(role)
                self.dtypes = {str(p.main_grad.dtype) for p in role.module.parameters()}
                self.gradients = gather(role, lambda p: p.main_grad)
            norm, lr = step()
            self.norms.append(norm)
            return norm, lr

        role.step = watched  # type: ignore[method-assign]

    def tensors(self) -> dict[str, torch.Tensor]:
        """grad/<name> and update/<name>."""
        after = gather(self.role, lambda p: p)
        updates = {f"update/{name}": after[name] - before for name, before in self.before.items()}
        return {f"grad/{name}": g for name, g in self.gradients.items()} | updates
