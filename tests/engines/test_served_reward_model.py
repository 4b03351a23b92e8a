"""A reward model served by a real SGLang: scores of whole responses and of steps are those of Hugging Face."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from engine_servers import VOCABULARY, engine_environment, make_tiny_model, start_engine

from asyppo_megatron.config import RewardConfig
from asyppo_megatron.rewards import ModelReward, Sample

pytestmark = pytest.mark.slow

# In a process of its own: tests may fork, which a process that has computed with torch should not.
MAKE = """
import json, sys, torch
from transformers import AutoConfig, Qwen3ForSequenceClassification
directory, rows = sys.argv[1], json.loads(sys.argv[2])
torch.manual_seed(1)
config = AutoConfig.from_pretrained(directory, num_labels=1)
config.architectures, config.pad_token_id = ["Qwen3ForSequenceClassification"], None
model = Qwen3ForSequenceClassification(config).float().eval()
head = model.score.weight.data.normal_()
state = {k: v.contiguous() for k, v in model.state_dict().items()}
state["score.bias"] = torch.tensor([0.25])  # SGLang's head has one, Hugging Face's has none
from safetensors.torch import save_file
for file in __import__("pathlib").Path(directory).glob("*.safetensors*"): file.unlink()
save_file(state, directory + "/model.safetensors", metadata={"format": "pt"})
config.save_pretrained(directory)
with torch.no_grad():
    for row in rows:
        hidden = model.model(input_ids=torch.tensor([row])).last_hidden_state
        print(json.dumps((hidden @ head.T)[0, :, 0].add(0.25).tolist()))
"""


def test_sglang_scores_responses_and_steps(tmp_path: Path):
    rng = np.random.default_rng(0)
    given = []
    for _ in range(5):
        prompt, response = (tuple(rng.integers(0, VOCABULARY, n).tolist()) for n in rng.integers(4, 20, 2))
        ends = (1, len(response) - 1)
        given.append(Sample("", "", pieces=("a", "b"), ends=ends, prompt_tokens=prompt, response_tokens=response))
    model = make_tiny_model(tmp_path / "model")
    rows = json.dumps([[*s.prompt_tokens, *s.response_tokens] for s in given])
    command = [sys.executable, "-c", MAKE, str(model), rows]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=engine_environment())
    assert done.returncode == 0, done.stderr
    expected = [json.loads(line) for line in done.stdout.splitlines()]

    server = start_engine(model, tmp_path, extra_args=["--is-embedding"])
    try:
        for per in ("response", "step"):
            reward = ModelReward(
                RewardConfig.model_validate(
                    {"kind": "model", "per": per, "timeout_s": 120, "model": {"url": server.url, "batch": 4}}
                )
            )
            for sample, verdict, scores in zip(given, reward.score_many(given), expected, strict=True):
                at = [len(sample.prompt_tokens) + e for e in (sample.ends if per == "step" else sample.ends[-1:])]
                found = verdict.pieces if per == "step" else (verdict.reward,)
                np.testing.assert_allclose(found, [scores[i] for i in at], atol=2e-5)
    finally:
        server.close()
