"""What the tests of rollouts through SGLang share: versions of weights, requests, what Hugging Face says of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine_servers import END
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from asyppo_megatron.config import Config
from asyppo_megatron.rollout.discovery import EngineFinder
from asyppo_megatron.rollout.engine import Completion, GenerationRequest, write_weights_manifest
from asyppo_megatron.rollout.sglang import SGLangEngine

VOCAB_SIZE = 512


def make_versions(model: Path, directory: Path, count: int) -> list[Path]:
    """Directories of weights of versions 0.., each another change of the model's; complete Hugging Face models too."""
    versions = []
    for version in range(count):
        target = directory / f"v{version}"
        shutil.copytree(model, target)
        generator = torch.Generator().manual_seed(version)
        tensors = load_file(model / "model.safetensors")
        moved = {k: t + 0.05 * version * torch.randn(t.shape, generator=generator) for k, t in tensors.items()}
        save_file(moved, target / "model.safetensors", metadata={"format": "pt"})
        write_weights_manifest(target, version, ["model.safetensors"])
        versions.append(target)
    return versions


def make_engine(config: Config) -> SGLangEngine:
    return SGLangEngine(config.rollout, EngineFinder(config), VOCAB_SIZE)


def requests(count: int, tokens: int, **settings: Any) -> list[GenerationRequest]:
    prompts = [np.array([10, 20, 30, 40 + i % 5], dtype=np.int32) for i in range(count)]
    settings = {"stop_token_ids": (END,), **settings}
    return [GenerationRequest(i, p, tokens, **settings) for i, p in enumerate(prompts)]


def reference_logits(model: Path, request: GenerationRequest, completion: Completion) -> torch.Tensor:
    """f32 [R, V] of every generated token's position, in one pass without a cache."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokens = [*request.prompt_tokens.tolist(), *completion.tokens.tolist()]
    with torch.no_grad():
        return network(torch.tensor([tokens])).logits[0, len(request.prompt_tokens) - 1 : -1]


def reference_logprobs(model: Path, request: GenerationRequest, completion: Completion) -> np.ndarray:
    scaled = (reference_logits(model, request, completion) / request.temperature).log_softmax(-1)
    return scaled.gather(1, torch.tensor(completion.tokens.astype(np.int64))[:, None])[:, 0].numpy()
