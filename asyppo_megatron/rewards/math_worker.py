"""One math-verify process: reads (text, answer) from a socket, writes verdicts; started by `MathVerifier` as a file.

It imports nothing of this package, so that a worker costs sympy and no more. It may be killed at any time.
"""

from __future__ import annotations

import ctypes
import functools
import json
import logging
import math
import os
import resource
import signal
import sys
import warnings
from multiprocessing.connection import Connection
from typing import Any

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve until the socket closes. Arguments: socket fd, parent pid, limit a call in seconds, memory in bytes."""
    fd, parent, timeout_s, memory = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    score = _scorer(max(1, math.floor(timeout_s / 2)))
    logging.disable(logging.CRITICAL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # parsers print what they stumble over
    connection = Connection(fd)
    connection.send_bytes(b'"ready"')
    while True:
        try:
            text, answer = json.loads(connection.recv_bytes())
        except EOFError:
            return
        # Should the parent be gone and this call stuck in C code, the kernel ends it.
        signal.setitimer(signal.ITIMER_PROF, timeout_s + 5)
        verdict = score(text, answer)
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.send_bytes(json.dumps(verdict).encode())


def _scorer(step_s: int) -> Any:
    """The scoring function; `step_s` bounds parsing and comparison each, where Python can interrupt them."""
    from math_verify import parse, verify
    from math_verify.errors import TimeoutException

    @functools.lru_cache(maxsize=4096)
    def gold(answer: str) -> Any:
        boxed = answer if "\\boxed" in answer or "$" in answer else f"\\boxed{{{answer}}}"
        return parse(boxed, parsing_timeout=step_s, raise_on_error=True)

    def score(text: str, answer: str) -> tuple[float, str]:
        try:
            reference = gold(answer)
            if not reference:
                return 0.0, "verifier_error"
            response = parse(text, parsing_timeout=step_s, raise_on_error=True)
            correct = verify(reference, response, timeout_seconds=step_s, raise_on_error=True)
            return float(bool(correct)), "ok"
        except TimeoutException:
            return 0.0, "verifier_timeout"
        except MemoryError:
            os._exit(1)  # what is left of the heap would fail the next response too; the parent replaces this process
        except Exception:  # hostile text can raise anything; the status says so and is counted
            return 0.0, "verifier_error"

    return score


if __name__ == "__main__":
    main()
