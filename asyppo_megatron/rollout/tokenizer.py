"""Loading a tokenizer, and the two things rollouts ask of it beside encoding."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer


def load_tokenizer(path: Path) -> Any:
    """The Hugging Face tokenizer of a local directory; no network, no remote code."""
    if not path.is_dir():
        raise ValueError(f"tokenizer {path}: no such directory; set data.tokenizer to one with tokenizer.json")
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as e:
        raise ValueError(f"tokenizer {path}: cannot be loaded: {e}") from e


def find_stop_tokens(tokenizer: Any, model_dir: Path, extra: Sequence[int] = ()) -> tuple[int, ...]:
    """End-of-sequence tokens of the tokenizer and of the model's configuration files, and `extra`."""
    stops = {int(i) for i in extra}
    if tokenizer.eos_token_id is not None:
        stops.add(int(tokenizer.eos_token_id))
    for name in ("config.json", "generation_config.json"):
        file = model_dir / name
        eos = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
        stops.update([eos] if isinstance(eos, int) else eos or [])
    return tuple(sorted(stops))


def decode(tokenizer: Any, tokens: np.ndarray) -> str:
    """Text of a response without special tokens; ids that only pad the model's vocabulary vanish."""
    return tokenizer.decode(tokens.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
