"""The tiny models and batches of the parity tests. Not a test file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from asyppo_megatron.types import PackedBatch, Trajectory, pack_trajectories

VOCAB = 131  # a prime: padded in every layout with tp > 1
ACTOR = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
CRITIC = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 12,
}


def save_model(path: Path, sizes: dict[str, int], *, tied: bool, seed: int) -> None:
    """A Qwen3 with random fp32 weights, norms included, so that no term of any gradient is trivial."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.Qwen3Config(
        **sizes, vocab_size=VOCAB, max_position_embeddings=128, tie_word_embeddings=tied, initializer_range=0.15,
        rms_norm_eps=1e-6, bos_token_id=1, eos_token_id=2, pad_token_id=0, dtype="float32",
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.add_(0.2 * torch.randn_like(p))
    model.save_pretrained(path)


def make_batch(groups: int, responses: int, seed: int = 0, step: int = 0) -> PackedBatch:
    """Prompts of 2-7 and responses of 1-15 random tokens, with rewards of both signs."""
    rng = np.random.default_rng(seed)
    trajectories = []
    for group in range(groups):
        prompt = rng.integers(3, VOCAB, size=rng.integers(2, 8)).astype(np.int32)
        for sample in range(responses):
            size = 1 if group == sample == 0 else int(rng.integers(1, 16))
            trajectories.append(
                Trajectory(
                    prompt_id=str(group),
                    group=group,
                    sample=sample,
                    prompt_tokens=prompt,
                    response_tokens=rng.integers(3, VOCAB, size=size).astype(np.int32),
                    rollout_logprobs=rng.normal(-4, 0.5, size=size).astype(np.float32),
                    reward=float(rng.normal()),
                    finish_reason="length" if sample % 3 == 2 else "stop",
                    policy_version=0,
                )
            )
    arrays = pack_trajectories(trajectories, step)
    tensors = {name: torch.from_numpy(a) for name, a in arrays.items() if not name.startswith("version")}
    return PackedBatch(step=step, policy_version=0, **tensors)


def with_rewards(batch: PackedBatch, chosen: torch.Tensor, shift: float) -> PackedBatch:
    """The batch with the rewards of `chosen` (bool [N]) shifted."""
    return replace(batch, rewards=torch.where(chosen, batch.rewards + shift, batch.rewards))
