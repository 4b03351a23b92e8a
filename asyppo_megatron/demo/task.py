"""Chained arithmetic modulo 10, answered directly or step by step.

A prompt `^7+5*3=` asks for the result, operators applied left to right, every result modulo 10. Two styles end in
the same marked answer: step by step `7+5=2;2*3=6;#6$` and direct `#6$`. A model can learn each step but not the
whole chain at once, so the direct style is wrong most of the time. The supervised base prefers it; reinforcement
learning finds out that the steps pay.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

VOCABULARY = "$^0123456789+-*=;#?!"  # `$` ends a response and pads; `?` stands for the unknown; `!` is spare
END, UNKNOWN = "$", "?"
OPERATIONS = (3, 4, 5)  # operators of a chain, equally often
OPERATORS = {"+": 0.4, "-": 0.4, "*": 0.2}  # a product tells much about a result's last digit, so fewer of them
DIRECT_SHARE = 0.78  # of the supervised examples


@dataclass(frozen=True)
class Chain:
    """One problem: a first digit and (operator, digit) pairs."""

    first: int
    rest: tuple[tuple[str, int], ...]

    @property
    def prompt(self) -> str:
        return f"^{self.first}" + "".join(f"{op}{digit}" for op, digit in self.rest) + "="

    @property
    def answer(self) -> str:
        return str(self._values()[-1])

    @property
    def direct(self) -> str:
        return f"#{self.answer}{END}"

    @property
    def step_by_step(self) -> str:
        values = self._values()
        steps = [
            f"{before}{op}{digit}={after};"
            for before, (op, digit), after in zip(values[:-1], self.rest, values[1:], strict=True)
        ]
        return "".join(steps) + self.direct

    def _values(self) -> list[int]:
        """The first digit, then the result of every step."""
        values = [self.first]
        for op, digit in self.rest:
            before = values[-1]
            values.append({"+": before + digit, "-": before - digit, "*": before * digit}[op] % 10)
        return values


def sample_chains(count: int, seed: int) -> list[Chain]:
    """`count` chains with distinct prompts, the same for the same seed."""
    rng = np.random.default_rng([seed, 10])
    chains: dict[str, Chain] = {}
    while len(chains) < count:
        size = int(rng.choice(OPERATIONS))
        digits, operators = rng.integers(0, 10, size + 1), rng.choice(list(OPERATORS), size, p=list(OPERATORS.values()))
        chain = Chain(int(digits[0]), tuple((str(o), int(d)) for o, d in zip(operators, digits[1:], strict=True)))
        chains.setdefault(chain.prompt, chain)
    return list(chains.values())


def supervised_examples(chains: list[Chain], seed: int) -> list[dict[str, str]]:
    """{prompt, response} of every chain, the direct style in a fixed share of them."""
    direct = np.random.default_rng([seed, 11]).permutation(len(chains)) < round(DIRECT_SHARE * len(chains))
    return [
        {"prompt": c.prompt, "response": c.direct if d else c.step_by_step} for c, d in zip(chains, direct, strict=True)
    ]


def problem_rows(chains: list[Chain], name: str) -> list[dict[str, str]]:
    """{id, problem, answer} of every chain."""
    return [{"id": f"{name}-{i}", "problem": c.prompt, "answer": c.answer} for i, c in enumerate(chains)]
