"""Compile every kernel for GPUs that are not here and print what their binaries hold, one JSON list.

Runs in a process of its own, without TRITON_INTERPRET. Registers, stack and local memory (spills) are cuobjdump's;
loads and stores are counted by width in the machine code.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from asyppo_megatron.kernels import ensemble_gae, policy_loss, softmax
from asyppo_megatron.kernels.reference import METRICS

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
CAPABILITIES = (80, 90, 100)


def cases() -> list[tuple[str, object, dict[str, str], dict[str, int | bool], list[str], int]]:
    """(name, kernel, types of the arguments, constants, arguments divisible by 16, warps)."""
    found = []
    numbers = {"labels": "*i64", "scale": "fp32", "inverse_temperature": "fp32"}
    for kind, width in (("bf16", 8), ("fp32", 4)):
        types = numbers | dict.fromkeys(["statistics", "saved", "grad_logprobs", "grad_entropies"], "*fp32")
        types |= {"logits": f"*{kind}", "grad_logits": f"*{kind}"}
        # A vocabulary of no multiple of 16 (num_valid) must not cost the wide loads: only the row's stride may.
        tile = {"THREADS": softmax.TILE // width, "COLUMNS": width}
        found.append((f"statistics {kind}", softmax.statistics_kernel, types, tile, ["row_stride"], softmax.NUM_WARPS))
        found.append(
            (f"gradient {kind}", softmax.gradient_kernel, types, {"TILE": softmax.TILE},
             ["row_stride", "grad_stride", "num_columns"], softmax.NUM_WARPS)
        )  # fmt: skip
    types = numbers | dict.fromkeys(["statistics", "results", "saved"], "*fp32")
    found.append(("finish", softmax.finish_kernel, types, {"ROWS": softmax.FINISH_ROWS}, [], 4))
    masks = dict.fromkeys(["loss_mask", "advantage_mask", "entropy_mask"], "*u8")
    scalars = dict.fromkeys(["low_number", "high_number", "dual_clip", "entropy_coef"], "fp32")
    for kind in ("ppo", "aspo"):  # cispo is less than ppo
        number = policy_loss.KINDS[kind]
        constants = {"KIND": number, "DUAL": kind == "ppo", "ENTROPY": True, "LOW_IS_TENSOR": False}
        constants |= {"HIGH_IS_TENSOR": False, "BLOCK": policy_loss.BLOCK}
        found.append((f"policy_loss {kind}", policy_loss.policy_loss_kernel, masks | scalars, constants, [], 4))
    types = {"loss_mask": "*u8", "cu_seqlens": "*i32", "decays": "*fp64", "bootstraps": "*fp64"}
    constants = {"CRITICS": 2, "MINIMUM": False, "BLOCK": ensemble_gae.BLOCK}
    found.append(("ensemble_gae", ensemble_gae.ensemble_gae_kernel, types, constants, [], 4))
    return found


INTEGERS = {"num_rows", "num_valid", "num_columns", "row_stride", "grad_stride", "vocab_start", "tiles_per_part"} | {
    "parts", "count", "num_tokens",
}  # fmt: skip


def compile_for(kernel, types, constants, aligned, warps, capability):
    """The compiled kernel; arguments without a type are f32 tensors, and every tensor starts on 16 bytes."""
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else "i32" if name in INTEGERS else types.get(name, "*fp32")
        for name in names
    }
    even = [name for name in names if signature[name].startswith("*") or name in aligned]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in even},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def figures(compiled) -> dict:
    """Registers, stack, local and shared bytes, and counts of loads and stores by width."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "-res-usage", "-sass", file.name]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", code)
    assert numbers, code[:2000]
    found = dict(zip(("registers", "stack", "shared", "local"), map(int, numbers.groups()), strict=True))
    wide = Counter(
        f"{'load' if name == 'LDG' else 'store'}{16 if '.128' in rest else 8 if '.64' in rest else 4}"
        for name, rest in re.findall(r"\b(LDG|STG)(\S*)", code)
    )
    return found | {"spills": len(re.findall(r"\b(?:STL|LDL)\b", code)), **wide}


def main() -> None:
    """Print the report."""
    assert os.environ.get("TRITON_INTERPRET") != "1", "interpreted kernels have no binary"
    assert policy_loss.SUMS.value == 1 + len(METRICS)
    found = []
    for capability in CAPABILITIES:
        for name, kernel, types, constants, aligned, warps in cases():
            compiled = compile_for(kernel, types, constants, aligned, warps, capability)
            found.append({"kernel": name, "capability": capability, **figures(compiled)})
    json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
