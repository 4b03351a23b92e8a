"""The scalar head of a mini-critic."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from asyppo_megatron.convert.critic import initial_value_head


class ValueHead(torch.nn.Linear):
    """Linear(H, 1) with bias in place of `GPTModel.output_layer`, replicated over tensor parallel.

    Under sequence parallelism each rank computes the values of its tokens and gathers the scalars, not the
    hidden states.
    """

    def __init__(self, config: Any, tp_group: Any):
        super().__init__(
            config.hidden_size, 1, bias=True, dtype=config.params_dtype, device=torch.cuda.current_device()
        )
        self.sequence_parallel, self.tp_group = config.sequence_parallel, tp_group
        for p in self.parameters():
            p.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # Megatron sums these over tp

    def reset(self, seed: int | None) -> None:
        """Random values of about +-0.1 for unit-variance hidden states, or zero when `seed` is None.

        Drawn on the CPU in fp32 by a generator of its own, so it is the same on every rank and in every layout.
        """
        weight, bias = initial_value_head(self.in_features, seed)
        with torch.no_grad():
            self.weight.copy_(weight)
            self.bias.copy_(bias)

    def forward(  # type: ignore[override]
        self, input_: torch.Tensor, weight: torch.Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[torch.Tensor, None]:
        """[s, b, H] (its own part under sequence parallelism) -> f32 [s, b, 1], the whole sequence."""
        values = super().forward(input_).float()  # regression targets need more than bf16's 8 bits
        if self.sequence_parallel:
            values = gather_from_sequence_parallel_region(
                values, tensor_parallel_output_grad=False, group=self.tp_group
            )
        return values, None
