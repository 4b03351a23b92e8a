"""Supervised training, which makes the demo's base models."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

PROMPT, RESPONSE = [5, 3, 7], [2, 9, 4, 1]
# A process of its own: one that has computed with torch must not fork ranks.
PROGRAM = """
import logging, sys
from pathlib import Path
import numpy as np
from asyppo_megatron.config import LayoutConfig, OptimizerConfig, RoleConfig
from asyppo_megatron.launch.local import run_ranks

data, out, prompt, response = Path(sys.argv[1]), Path(sys.argv[2]), *map(eval, sys.argv[3:])

def task(name, ranks, tp):
    from asyppo_megatron.sft import SupervisedTask
    role = RoleConfig(model=data / name, ranks=ranks, layout=LayoutConfig(tp=tp), precision="fp32",
                      optimizer=OptimizerConfig(lr=5e-3))
    return SupervisedTask(name, role, out / name, steps=8, batch_size=4)

def rank(number):
    from asyppo_megatron.sft import Example, run_supervised
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    example = Example(np.array(prompt, np.int32), np.array(response, np.int32))
    run_supervised([task("actor", (0, 1), 2), task("critic", (2, 3), 1)], [example], seed=0)

run_ranks(4, rank)
"""


def loss_of(model: Path) -> float:
    """Mean negative logprob of the response, by Hugging Face in float64."""
    tokens = torch.tensor([PROMPT + RESPONSE])
    logits = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)(tokens).logits[0, len(PROMPT) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, tokens[0, len(PROMPT) :]).item()


def test_supervised_training_begins_at_the_loss_of_hugging_face_and_exports_what_it_learned(data: Path, tmp_path: Path):
    command = [sys.executable, "-c", PROGRAM, str(data), str(tmp_path), str(PROMPT), str(RESPONSE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": "."})
    assert done.returncode == 0, done.stderr[-4000:]
    for name in ("actor", "critic"):
        found = re.findall(rf"{name} step (\d+): loss ([\d.]+)", done.stdout + done.stderr)
        first, last = (float(loss) for _, loss in (found[0], found[-1]))
        assert np.isclose(first, loss_of(data / name), atol=2e-4)
        assert loss_of(tmp_path / name) < last < first / 2
