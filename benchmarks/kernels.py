"""Claim: the fused operators run near the memory bandwidth, and ahead of what others offer, on the GPU at hand.

Per row and shape, all candidates in one run: 20 warm-ups, then 100 timed repetitions in rotating order, the L2 cache
flushed before each, CUDA events; median and p10/p90. "of ceiling" is the time that this card's measured copy (or, for
hidden -> loss, cuBLAS) needs for the bytes (or flops) that cannot be avoided, over the median. Errors are against
float64 on sampled rows, peak memory is one call's beyond its inputs. Tensor parallelism is emulated: one rank's shard
of the vocabulary, no communication. Rows with logprob alone and with logprob and entropy are never compared.

    python benchmarks/kernels.py --out benchmarks/results/kernels.json
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median, quantiles

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from machine import describe_machine

from asyppo_megatron.kernels.policy import choose

VOCABULARY, FLUSH_BYTES = 151_936, 512 * 2**20
ERROR_ROWS, WARMUP = 64, 20
ROWS = ("logprob fwd", "logprob+H fwd", "logprob+H fwd+bwd", "hidden -> loss fwd+bwd")
# What a missing or too old package, or too little memory, raises: a line of the table, not the end of the run.
FAILURES = (ImportError, AttributeError, TypeError, ValueError, RuntimeError)


@dataclass(frozen=True)
class Case:
    """One shape: T tokens, one shard of the vocabulary, H hidden (only for hidden -> loss)."""

    row: str
    tokens: int
    tp: int
    hidden: int

    @property
    def width(self) -> int:
        return VOCABULARY // self.tp


class Inputs:
    """Tensors of a case; fresh logits for every candidate, since some write over them."""

    def __init__(self, case: Case, device: torch.device):
        self.device = device
        self.generator = torch.Generator(device).manual_seed(0)
        tokens, width = case.tokens, case.width
        self.labels = torch.randint(0, width, (tokens,), device=device, generator=self.generator)
        old, advantages, self.up_logprob, self.up_entropy = (self._normal(tokens) for _ in range(4))
        mask = torch.ones(tokens, dtype=torch.bool, device=device)
        cu_seqlens = torch.tensor([0, tokens // 2, tokens], dtype=torch.int32, device=device)
        self.batch = (old - 10.0, advantages, mask, cu_seqlens)
        self.logits = self.hidden = self.weight = None
        if case.hidden:
            self.hidden = self._normal(tokens, case.hidden).bfloat16().requires_grad_()
            self.weight = (self._normal(width, case.hidden) * 3 / case.hidden**0.5).bfloat16().requires_grad_()
        else:
            self.logits = torch.empty(tokens, width, dtype=torch.bfloat16, device=device).requires_grad_()
            self.refill()

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, generator=self.generator)

    def refill(self) -> None:
        """The same logits again, whatever a candidate has made of them."""
        if self.logits is not None:
            self.logits.data.normal_(0.0, 3.0, generator=torch.Generator(self.device).manual_seed(1))


def softmax_steps(name: str, operator: Callable, inputs: Inputs) -> Callable[[], tuple]:
    """One timed call of a logprob (and entropy) operator `operator(logits, labels)`."""
    x, labels = inputs.logits, inputs.labels

    def forward() -> tuple:
        with torch.no_grad():
            return tuple(operator(x, labels))

    def both() -> tuple:
        out = tuple(operator(x, labels))
        return *out, *torch.autograd.grad(out, x, (inputs.up_logprob, inputs.up_entropy)[: len(out)])

    return both if name.endswith("bwd") else forward


def loss_step(logprob_entropy: Callable, policy_loss: Callable, inputs: Inputs) -> Callable[[], tuple]:
    """One timed call from hidden states to the loss and the gradients of hidden and weight."""

    def step() -> tuple:
        logits = inputs.hidden @ inputs.weight.t()
        logprobs, entropies = logprob_entropy(logits, inputs.labels)
        loss = policy_loss(logprobs, entropies, *inputs.batch, entropy_coef=0.01)
        return loss.sum.detach(), *torch.autograd.grad(loss.sum, (inputs.hidden, inputs.weight))

    return step


def head_step(inputs: Inputs) -> Callable[[], tuple]:
    """The same without the logits; the weight's gradient is added to an f32 buffer, as Megatron keeps it."""
    head = importlib.import_module("asyppo_megatron.kernels.linear_policy_loss").linear_policy_loss
    tensors = (inputs.hidden, inputs.weight)
    main_grad = torch.zeros(inputs.weight.shape, device=inputs.device)

    def step() -> tuple:
        loss = head(*tensors, inputs.labels, *inputs.batch, entropy_coef=0.01, main_grad=main_grad).sum
        return loss.detach(), *torch.autograd.grad(loss, tensors)

    return step


def compiled_softmax(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain torch, for torch.compile."""
    logp = torch.log_softmax(logits.float(), -1)
    return logp.gather(-1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def verl() -> Callable:
    functions = importlib.import_module("verl.utils.torch_functional")
    return lambda x, y: (functions.logprobs_from_logits(x, y), functions.entropy_from_logits(x))


def flash_attention() -> Callable:
    function = importlib.import_module("flash_attn.ops.triton.cross_entropy").cross_entropy_loss
    return lambda x, y: (-function(x, y)[0],)


def liger() -> Callable:
    function = importlib.import_module("liger_kernel.transformers.functional").liger_cross_entropy
    return lambda x, y: (-function(x, y, reduction="none"),)


def megatron() -> Callable:
    module = importlib.import_module("megatron.core.fusions.fused_cross_entropy")
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
    function, group = module.fused_vocab_parallel_cross_entropy, torch.distributed.group.WORLD
    return lambda x, y: (-function(x[:, None], y[:, None], group)[:, 0],)


def compiled(outputs: int) -> Callable:
    return torch.compile(lambda x, y: compiled_softmax(x, y)[:outputs], dynamic=False)


# Builders of others' operators: (logits, labels) -> (logprobs, entropies), and -> (logprobs,).
WITH_ENTROPY = {"torch.compile": lambda: compiled(2), "verl": verl}
ALONE = {"torch.compile": lambda: compiled(1), "flash-attention": flash_attention, "Liger": liger, "Megatron": megatron}


def candidates(case: Case, inputs: Inputs) -> Iterator[tuple[str, Callable[[], Callable[[], tuple]]]]:
    """(name, builder of one timed call) of everything that can do this row; ours and eager first."""
    ours, plain = choose(inputs.device), choose(inputs.device, "reference")
    if case.hidden:
        inplace = lambda x, y: ours.logprob_entropy(x, y, inplace=True)  # noqa: E731
        yield "kernels, no logits", lambda: head_step(inputs)
        yield "kernels, in place", lambda: loss_step(inplace, ours.policy_loss, inputs)
        yield "eager", lambda: loss_step(plain.logprob_entropy, plain.policy_loss, inputs)
        yield "torch.compile", lambda: loss_step(compiled(2), plain.policy_loss, inputs)
        return
    alone = case.row == "logprob fwd"
    own = [("kernels", ours.logprob_entropy), ("eager", plain.logprob_entropy)]
    own += [("kernels, in place", lambda x, y: ours.logprob_entropy(x, y, inplace=True))] * case.row.endswith("bwd")
    for name, operator in own:
        take = (lambda x, y, f=operator: f(x, y)[:1]) if alone else operator
        yield name, lambda take=take: softmax_steps(case.row, take, inputs)
    for name, build in (ALONE if alone else WITH_ENTROPY).items():
        yield name, lambda build=build: softmax_steps(case.row, build(), inputs)


def errors(case: Case, inputs: Inputs, found: tuple, logits: torch.Tensor) -> dict[str, float]:
    """Largest errors of sampled rows against float64; `logits` are those rows as they were."""
    rows = slice(0, ERROR_ROWS)
    x = logits.double().requires_grad_()
    logp = torch.log_softmax(x, -1)
    expected = [logp.gather(-1, inputs.labels[rows, None])[:, 0], -(logp.exp() * logp).sum(-1)]
    kept = [y[rows].double() for y in found]
    result = {n: (a - b).abs().max().item() for n, a, b in zip(("logprob", "entropy"), kept, expected, strict=False)}
    if case.row.endswith("bwd"):
        up = (inputs.up_logprob[rows].double(), inputs.up_entropy[rows].double())
        (gradient,) = torch.autograd.grad(expected, x, up)
        result["gradient_relative"] = ((kept[2] - gradient).norm() / gradient.norm()).item()
    return result


def timed(steps: dict[str, Callable], warmup: int, repetitions: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of every repetition of every candidate, in rotating order with a cold cache."""
    flush, names = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device), list(steps)
    found: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(warmup + repetitions):
        turn = repetition % len(names)
        for name in names[turn:] + names[:turn]:
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            steps[name]()
            end.record()
            end.synchronize()
            if repetition >= warmup:
                found[name].append(start.elapsed_time(end))
    return found


def ceilings(device: torch.device) -> dict[str, float]:
    """This card's own copy bandwidth, TB/s (bytes read and written), and bf16 matmul, TFLOP/s."""
    source = torch.empty(2**31, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device=device).bfloat16() for _ in range(2))
    found = timed({"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}, 5, 30, device)
    copy, matmul = median(found["copy"]), median(found["matmul"])
    return {"copy_tb_s": 2 * 2**31 / copy / 1e9, "matmul_tflop_s": 2 * 8192**3 / matmul / 1e9}


def floor_ms(case: Case, limits: dict[str, float]) -> float:
    """Milliseconds that the case cannot be faster than on this card (three GEMMs for hidden -> loss)."""
    if case.hidden:
        return 6 * case.tokens * case.width * case.hidden / limits["matmul_tflop_s"] / 1e9
    passes = 3 if case.row.endswith("bwd") else 1
    return passes * 2 * case.tokens * case.width / limits["copy_tb_s"] / 1e9


def measure(case: Case, device: torch.device, limits: dict[str, float], repetitions: int) -> list[dict]:
    """One table row for every candidate of a case."""
    inputs, steps, rows = Inputs(case, device), {}, []
    for name, build in candidates(case, inputs):
        row = {"row": case.row, "tokens": case.tokens, "vp": case.width, "hidden": case.hidden, "candidate": name}
        try:
            step = build()
            step()  # compiles
            inputs.refill()
            before = None if inputs.logits is None else inputs.logits.detach()[:ERROR_ROWS].clone()
            torch.cuda.reset_peak_memory_stats(device)
            held = torch.cuda.memory_allocated(device)
            found = step()
            torch.cuda.synchronize(device)
            row["peak_gib"] = (torch.cuda.max_memory_allocated(device) - held) / 2**30
            row |= {} if before is None else errors(case, inputs, found, before)
            steps[name] = step
        except FAILURES as error:
            row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]
        found = None
        inputs.refill()
        torch.cuda.empty_cache()
        rows.append(row)
    times = timed(steps, WARMUP, repetitions, device)
    for row in rows:
        if row["candidate"] in steps:
            ms = times[row["candidate"]]
            tenths = quantiles(ms, n=10)
            row |= {"ms": median(ms), "p10": tenths[0], "p90": tenths[-1]}
            row["of_ceiling"] = floor_ms(case, limits) / row["ms"]
        print(show(row), flush=True)
    return rows


def show(row: dict) -> str:
    """A line of the table."""
    head = f"{row['row']:<24}{row['tokens']:>7}{row['vp']:>8}{row['hidden'] or '-':>6}  {row['candidate']:<18}"
    if "failed" in row:
        return f"{head} {row['failed']}"
    wrong = " ".join(f"{k} {row[k]:.0e}" for k in ("logprob", "entropy", "gradient_relative") if k in row)
    head += f"{row['ms']:>9.3f} ms [{row['p10']:.3f}, {row['p90']:.3f}]"
    return f"{head} {row['of_ceiling']:>5.0%} of ceiling {row['peak_gib']:>7.2f} GiB  {wrong}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--hidden", type=int, nargs="+", default=[2560, 4096, 5120])
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 8], help="shards of the vocabulary to emulate")
    parser.add_argument("--repetitions", type=int, default=100)
    parser.add_argument("--out", type=Path, help="JSON file with everything, machine and versions included")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("kernels: no CUDA device here, nothing measured; run this command on a machine with a GPU")
        return 0
    device = torch.device("cuda", torch.cuda.current_device())
    machine, limits = describe_machine(with_gpu=True), ceilings(device)
    print(f"{machine['gpus']}: copy {limits['copy_tb_s']:.2f} TB/s, matmul {limits['matmul_tflop_s']:.0f} TFLOP/s")
    rows: list[dict] = []
    for t, tp, row in product(arguments.tokens, arguments.tp, ROWS):
        for hidden in arguments.hidden if row == ROWS[3] else [0]:
            rows += measure(Case(row, t, tp, hidden), device, limits, arguments.repetitions)
    if arguments.out:
        result = {"machine": machine, "ceilings": limits, "repetitions": arguments.repetitions, "rows": rows}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
