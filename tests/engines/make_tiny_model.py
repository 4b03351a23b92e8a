"""Save a random tiny model with its tokenizer, and what remains of it after the way to Megatron and back.

python make_tiny_model.py DIRECTORY qwen3|qwen2|llama TIED SEED
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from engine_servers import END, VOCABULARY, original_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

from asyppo_megatron.cli import main as asyppo

CONFIGS = {"qwen3": Qwen3Config, "qwen2": Qwen2Config, "llama": LlamaConfig}


def main() -> None:
    directory, family, tied, seed = Path(sys.argv[1]), *sys.argv[2:]
    original, megatron = original_of(directory), directory.with_name(f"{directory.name}-megatron")
    save_random_model(original, family, bool(int(tied)), int(seed))
    steps = [
        ["to-megatron", "--hf", str(original), "--out", str(megatron), "--tp", "2"],
        ["to-hf", "--megatron", str(megatron), "--out", str(directory)],
    ]
    for step in steps:
        if asyppo(["convert", *step, "--processes", "1", "--quiet"]) != 0:
            sys.exit(1)


def save_random_model(directory: Path, family: str, tied: bool, seed: int) -> None:
    """Weights and tokenizer."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,  # two pipeline stages of two layers
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": tied,
        "eos_token_id": END,
        "bos_token_id": None,
        "pad_token_id": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "dtype": torch.float32,
    }
    if family != "qwen2":
        sizes["head_dim"] = 32
    model = AutoModelForCausalLM.from_config(CONFIGS[family](**sizes), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():  # norms of ones and biases of zeros would hide what is not loaded
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(directory)
    vocabulary = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": END}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.save_pretrained(directory)


if __name__ == "__main__":
    main()
