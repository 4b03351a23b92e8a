"""A step of hostile responses, from their tokens to the step's counts: each cause is counted, right ones stay right."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from asyppo_megatron.config import build_config
from asyppo_megatron.rewards import build_rewards
from asyppo_megatron.rollout.dataset import Problem
from asyppo_megatron.rollout.engine import Completion
from asyppo_megatron.rollout.reward_statistics import reward_statistics
from asyppo_megatron.rollout.scoring import score_completions

PROGRAMS = {
    "ok": ["print(input())", "print(2)"],
    "code_timeout": ["while True: pass"],
    "code_processes": ["import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"],
    "code_forbidden": ["import socket; socket.socket()"],
    "code_memory": ["x = bytearray(1 << 44)"],
    "code_error": ["open('/etc/hosts', 'w')", "import os; os.kill(1, 0); os.setuid(0)"],
    "code_output": ["while True: print('x' * 1000)"],
}
TEXTS = {
    "ok": [r"\boxed{1}", r"\boxed{2}", "", "{" * 100_000],
    None: [r"\boxed{9^{9^{9^{9}}}}", "\\boxed{" + "(" * 50_000, "x^{" * 3000 + "2" + "}" * 3000],
}


@pytest.fixture(scope="module")
def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_a_step_of_hostile_responses_is_scored_counted_and_over_in_time(tokenizer):
    config = build_config(
        {
            "actor": {"model": "a"},
            "critics": [{"model": "c"}] * 2,
            "rewards": [
                {"kind": "math", "workers": 1, "timeout_s": 3},
                {"kind": "code", "workers": 2, "timeout_s": 30, "sandbox": {"test_timeout_s": 3}},
            ],
            "data": {
                "sources": [
                    {"name": "sums", "path": "x", "rewards": ["math"]},
                    {"name": "programs", "path": "y", "rewards": ["code"]},
                ]
            },
        }
    )
    tests = {"tests": [{"stdin": "1", "stdout": "1"}]}
    cases = [("sums", t, s) for s, texts in TEXTS.items() for t in texts]
    cases += [("programs", f"```python\n{p}\n```", s) for s, programs in PROGRAMS.items() for p in programs]
    problems = [
        Problem(str(i), "p", "1", np.zeros(1, np.int32), tests, name, ("math" if name == "sums" else "code",))
        for i, (name, _, _) in enumerate(cases)
    ]
    ids = [np.array(tokenizer(text)["input_ids"], dtype=np.int32) for _, text, _ in cases]
    completions = [Completion(i, t, np.zeros(len(t), np.float32), "length", 1.0, 0) for i, t in enumerate(ids)]
    try:
        rewards = build_rewards(config, tokenizer)
    except ValueError as e:
        pytest.skip(str(e))
    start = time.monotonic()
    try:
        scored = score_completions(completions, problems, tokenizer, rewards)
    finally:
        rewards.close()
    assert time.monotonic() - start < 200
    for (name, text, status), result in zip(cases, scored, strict=True):
        right = text in (r"\boxed{1}", "```python\nprint(input())\n```")
        assert result.verdict.reward == float(right), (name, text[:80], result.verdict)
        if status is not None:
            assert result.verdict.status == status, (name, text[:80], result.verdict)
    statistics = reward_statistics(scored, problems)
    expected = Counter({f"reward/code/{s}": len(programs) for s, programs in PROGRAMS.items() if s != "ok"})
    assert {k: v for k, v in statistics.items() if k.startswith("reward/code/code_")} == expected
    assert statistics["reward/code/count"] == 9 and statistics["source/sums/responses"] == 7
