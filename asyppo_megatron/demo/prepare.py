"""The demo's files: tokenizer, model configurations, supervised, training and held-out problems."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config

from asyppo_megatron.demo import task

FORMAT = 2  # raise it when the files change, so that older ones are made anew
NUM_SUPERVISED, NUM_TRAIN, NUM_HELD_OUT = 32768, 4096, 256


@dataclass(frozen=True)
class DemoFiles:
    """Where the demo's files lie. overlap: held-out prompts that are also in the other sets (0)."""

    directory: Path
    overlap: int

    @property
    def tokenizer(self) -> Path:
        return self.directory / "tokenizer"

    @property
    def actor(self) -> Path:
        return self.directory / "actor"

    @property
    def critic(self) -> Path:
        return self.directory / "critic"

    @property
    def supervised(self) -> Path:
        return self.directory / "sft.jsonl"

    @property
    def train(self) -> Path:
        return self.directory / "rl_train.jsonl"

    @property
    def held_out(self) -> Path:
        return self.directory / "heldout.jsonl"


def prepare_demo(directory: Path, seed: int = 0) -> DemoFiles:
    """Write the demo's files, or do nothing where they are there already; complete or not there at all."""
    marker = directory / "demo.json"
    wanted = {"format": FORMAT, "seed": seed}
    if marker.is_file():
        found = json.loads(marker.read_text())
        if {key: found.get(key) for key in wanted} == wanted:
            return DemoFiles(directory, found["overlap"])
    directory.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        files = DemoFiles(part, _write_problems(part, seed))
        build_tokenizer().save_pretrained(files.tokenizer)
        actor_config().save_pretrained(files.actor)
        critic_config().save_pretrained(files.critic)
        (part / "demo.json").write_text(json.dumps({**wanted, "overlap": files.overlap}))
        directory.mkdir(exist_ok=True)
        marker.unlink(missing_ok=True)
        # The marker last: it says that the others are complete. What else lies in the directory stays.
        for path in sorted(part.iterdir(), key=lambda p: p.name == marker.name):
            _replace(path, directory / path.name)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return DemoFiles(directory, files.overlap)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; `$` ends and pads."""
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(task.VOCABULARY)}, unk_token=task.UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=task.UNKNOWN, eos_token=task.END, pad_token=task.END
    )


def actor_config() -> Qwen3Config:
    return _config(hidden_size=96, head_dim=24, intermediate_size=256)


def critic_config() -> Qwen3Config:
    """A critic of about a quarter of the actor's parameters."""
    return _config(hidden_size=48, head_dim=12, intermediate_size=128)


def _config(**sizes: int) -> Qwen3Config:
    end = task.VOCABULARY.index(task.END)
    return Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=len(task.VOCABULARY),
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.08,  # the usual 0.02 is for hidden sizes in the thousands
        eos_token_id=end,
        pad_token_id=end,
        bos_token_id=None,
        dtype="float32",
        **sizes,
    )


def _write_problems(directory: Path, seed: int) -> int:
    """Write the three sets; how many held-out prompts are in another set."""
    chains = task.sample_chains(NUM_HELD_OUT + NUM_TRAIN + NUM_SUPERVISED, seed)
    held_out, train = chains[:NUM_HELD_OUT], chains[NUM_HELD_OUT : NUM_HELD_OUT + NUM_TRAIN]
    supervised = chains[NUM_HELD_OUT + NUM_TRAIN :]
    _write_rows(directory / "heldout.jsonl", task.problem_rows(held_out, "heldout"))
    _write_rows(directory / "rl_train.jsonl", task.problem_rows(train, "train"))
    _write_rows(directory / "sft.jsonl", task.supervised_examples(supervised, seed))
    return len({c.prompt for c in held_out} & {c.prompt for c in [*train, *supervised]})


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _replace(source: Path, target: Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    source.replace(target)
