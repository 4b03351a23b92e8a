"""Causal attention over packed sequences with torch alone: the core attention of the local layer spec.

Where Transformer Engine is present its attention is used instead (`models/gpt.py`). On a GPU in bf16 torch's
variable-length flash attention reads the pack as it is. On a CPU, and in fp32, sequences are scattered into a
dense [n, longest] block for `scaled_dot_product_attention` (11 ms where a loop over sequences takes 39 and
a block mask 483, forward and backward, for 5k tokens); the index for that is made once a pack.

Under context parallelism a rank has the queries of its chunks of every sequence and gathers the keys and values of
the pack; their gradients are summed on the way back. That path is always dense, with a mask by position.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule

from asyppo_megatron.models.rope import inverse_frequencies, rotate
from asyppo_megatron.parallel.context import ContextSplit

FLASH_MULTIPLE = 8  # of head dimensions that flash kernels accept


@dataclass
class PackGeometry:
    """What attention derives from a pack's `cu_seqlens`; made once a pack, shared by all layers.

    t tokens of this rank's queries, n sequences; keys differ from queries only under context parallelism.

    Attributes:
        positions: i64 [t], position of each token in its sequence.
        slots: i64 [t], place of each token in the dense [n * longest] block of queries.
        shape: (n, longest) of the queries.
        key_slots: as `slots`, of the pack's keys.
        key_shape: as `shape`, of the pack's keys.
        split: how the pack is split over context parallelism, or None.
        rotary: cos and sin [t, 1, d] by dtype, filled on first use.
        mask: bool [n, 1, longest, longest of the keys], which keys a query sees; filled on first use, with `split`.
    """

    positions: torch.Tensor
    slots: torch.Tensor
    shape: tuple[int, int]
    key_slots: torch.Tensor
    key_shape: tuple[int, int]
    split: ContextSplit | None = None
    rotary: dict[torch.dtype, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    mask: torch.Tensor | None = None

    def visible(self) -> torch.Tensor:
        """`mask`. A place without a query sees the first key, so that no row is empty."""
        if self.mask is None:
            n, longest = self.shape
            at = torch.zeros(n * longest, dtype=torch.long, device=self.slots.device)
            at[self.slots] = self.positions
            keys = torch.arange(self.key_shape[1], device=at.device)
            self.mask = (keys <= at.view(n, longest, 1)).unsqueeze(1)
        return self.mask


def packed_seq_params(
    cu_seqlens: torch.Tensor, num_tokens: int, max_seqlen: int, split: ContextSplit | None = None
) -> PackedSeqParams:
    """Megatron's description of a pack, with our geometry attached.

    Args:
        cu_seqlens: i32 [n + 1], on the compute device, dummy sequences included; of the whole pack.
        num_tokens: of the whole pack, known on the host.
        max_seqlen: longest sequence, known on the host.
        split: under context parallelism.
    """
    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
    )
    n = cu_seqlens.numel() - 1
    starts = cu_seqlens[:-1].long()
    sequence = torch.repeat_interleave(
        torch.arange(n, device=cu_seqlens.device), cu_seqlens[1:].long() - starts, output_size=num_tokens
    )
    positions = torch.arange(num_tokens, device=cu_seqlens.device) - starts[sequence]
    key_slots, key_shape = sequence * max_seqlen + positions, (n, max_seqlen)
    if split is None:
        params.geometry = PackGeometry(positions, key_slots, key_shape, key_slots, key_shape)
        return params
    size = num_tokens // split.positions.numel()
    sequence = split.local(sequence)
    offset = torch.arange(num_tokens // size, device=cu_seqlens.device) - (starts // size)[sequence]
    slots = sequence * (max_seqlen // size) + offset
    params.geometry = PackGeometry(split.local(positions), slots, (n, max_seqlen // size), key_slots, key_shape, split)
    return params


class PackedAttention(MegatronModule):
    """Core attention for packed sequences; rotates queries and keys itself.

    Megatron's own rotary embedding of packed sequences loops over them on the host in every layer; here cos and
    sin are looked up by position, once a pack.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **_: Any,
    ):
        super().__init__(config)
        self.scale = softmax_scale or config.kv_channels**-0.5
        self.tp_group = pg_collection.tp  # read by sharded_state_dict
        inv = inverse_frequencies(config.kv_channels, config.asyppo_rope_theta, config.asyppo_rope_scaling)
        self.register_buffer("inv_freq", inv.to(torch.cuda.current_device()), persistent=False)

    def _rotary(self, geometry: PackGeometry, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        if dtype not in geometry.rotary:
            # Angles in fp32 whatever the model's dtype: position 8000 has no exact bf16.
            angles = torch.outer(geometry.positions.float(), self.inv_freq.float())
            angles = torch.cat((angles, angles), -1).unsqueeze(1)
            geometry.rotary[dtype] = (angles.cos().to(dtype), angles.sin().to(dtype))
        return geometry.rotary[dtype]

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """query [t, heads, d], key and value [t, kv heads, d] -> [t, heads * d], all of this rank's tokens."""
        if packed_seq_params is None:
            raise ValueError("attention: got no packed_seq_params, need a pack; every pass of a role is packed")
        geometry: PackGeometry = packed_seq_params.geometry
        cos, sin = self._rotary(geometry, query.dtype)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if geometry.split is not None:
            # One collective over the context-parallel group a layer, called by every rank of it.
            both = geometry.split.gather(torch.stack((key, value), 1), sum_gradients=True)
            return self._dense(query, *both.unbind(1), geometry)
        if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
            return self._varlen(query, key, value, packed_seq_params)
        return self._dense(query, key, value, geometry)

    def _varlen(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, params: PackedSeqParams
    ) -> torch.Tensor:
        from torch.nn.attention.varlen import varlen_attn

        repeat, head_dim = query.size(1) // key.size(1), query.size(2)
        if repeat > 1:  # not by `enable_gqa`, which torch 2.11 does not have
            key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
        missing = -head_dim % FLASH_MULTIPLE  # zeros change no score, and their outputs are cut off
        out = varlen_attn(
            *(F.pad(x, (0, missing)) if missing else x for x in (query, key, value)),
            params.cu_seqlens_q,
            params.cu_seqlens_kv,
            params.max_seqlen_q,
            params.max_seqlen_kv,
            scale=self.scale,
            window_size=(-1, 0),
        )
        return out[..., :head_dim].flatten(1)

    def _dense(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, geometry: PackGeometry
    ) -> torch.Tensor:
        repeat = query.size(1) // key.size(1)
        if geometry.split is not None and query.is_cuda and repeat > 1:
            # CUDA's kernels that take a mask take no grouped heads: torch would fall back to whole score matrices.
            key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)

        def dense(x: torch.Tensor, slots: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
            block = x.new_zeros(shape[0] * shape[1], *x.shape[1:]).index_copy(0, slots, x)
            return block.view(*shape, *x.shape[1:]).transpose(1, 2)

        out = F.scaled_dot_product_attention(
            dense(query, geometry.slots, geometry.shape),
            dense(key, geometry.key_slots, geometry.key_shape),
            dense(value, geometry.key_slots, geometry.key_shape),
            attn_mask=None if geometry.split is None else geometry.visible(),
            is_causal=geometry.split is None,
            scale=self.scale,
            enable_gqa=query.size(1) != key.size(1),
        )
        return out.transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, geometry.slots)
