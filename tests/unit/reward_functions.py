"""Reward functions as a user would write them, good and bad; loaded by import path."""

from __future__ import annotations

import asyncio
import os
import time

CALLS = 0


def length(*, response, answer, problem, extra):
    return len(response) + 0.5 * (answer == "yes") + extra.get("bonus", 0)


async def slow_echo(*, response, answer, problem, extra):
    await asyncio.sleep(float(answer))
    return float(response)


def steps_with_digits(*, response, answer, problem, extra, steps):
    return [float(any(c.isdigit() for c in step)) for step in steps]


def token_lengths(*, response, answer, problem, extra, tokens):
    return [len(t) for t in tokens]


def misbehaves(*, response, answer, problem, extra):
    if response == "raise":
        raise KeyError("no such thing")
    if response == "hang":
        time.sleep(1000)
    if response == "die":
        os._exit(3)
    if response == "nan":
        return float("nan")
    if response == "text":
        return "1.0"
    if response == "none":
        return None
    if response == "memory":
        return len(bytearray(1 << 40))
    if response == "exit":
        raise SystemExit(0)
    return 1


not_a_function = 3
