"""One SGLang server as the driver sees it: requests with deadlines, what went wrong with it, and its replies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np

from asyppo_megatron.rollout.engine import Completion, GenerationRequest

CONNECT_TIMEOUT_S = 10.0
MAX_SAMPLING_MASK = 2048  # top_k up to which a server can say what it kept (its own limit is 4096, ties included)
_OK, _BAD_REQUEST, _SERVER_ERROR = 200, 400, 500


class EngineFault(Exception):
    """A request that failed for a reason that lies in the engine: it may succeed on another one, or later.

    Attributes:
        is_lost: the engine cannot be reached or does not answer, so nothing else of it will come either.
    """

    def __init__(self, message: str, *, is_lost: bool = False):
        super().__init__(message)
        self.is_lost = is_lost


@dataclass(eq=False)
class Server:
    """One server and what the driver knows about it.

    Attributes:
        url: http://host:port.
        is_ready: it holds the current weights and answers.
        reason: why not.
        version: of the weights it was given by this driver; None when unknown.
        lacks_weights: it answers, but has other weights than the current ones, which lie in no directory.
        in_flight: requests sent to it or about to be.
        not_before: monotonic time before which nothing is sent, after it failed.
        failures: in a row.
        answered: monotonic time of its last sign of life while it had work.
        incarnation: changes when its process is another one; "" where nobody says.
        calls: its generations under way, to be given up together.
        is_paused: by this driver.
        lock: held while its weights change.
    """

    url: str
    is_ready: bool = False
    reason: str = "not reached yet"
    version: int | None = None
    lacks_weights: bool = False
    in_flight: int = 0
    not_before: float = 0.0
    failures: int = 0
    answered: float = 0.0
    incarnation: str = ""
    calls: set[asyncio.Task[bytes]] = field(default_factory=set)
    is_paused: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def request(
        self,
        session: aiohttp.ClientSession,
        path: str,
        timeout_s: float,
        body: Mapping[str, Any] | None = None,
        method: str = "POST",
    ) -> bytes:
        """The body of a successful answer.

        Raises:
            EngineFault: it cannot be reached, is too slow, or answered with an error of its own.
            ValueError: it says that the request is wrong.
        """
        limits = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S)
        data = json.dumps(body) if body is not None else None
        headers = {"Content-Type": "application/json"} if data is not None else None
        try:
            async with session.request(method, self.url + path, data=data, headers=headers, timeout=limits) as answer:
                content = await answer.read()
        except TimeoutError as e:
            raise EngineFault(f"{path}: no answer in {timeout_s:.0f} s", is_lost=True) from e
        except (aiohttp.ClientError, OSError) as e:
            raise EngineFault(f"{path}: connection lost ({e or type(e).__name__})", is_lost=True) from e
        if answer.status == _OK:
            return content
        said = f"{path}: answered {answer.status}: {content[:300].decode(errors='replace')}"
        if _BAD_REQUEST <= answer.status < _SERVER_ERROR:
            raise ValueError(f"engine {self.url}: {said}")
        raise EngineFault(said)

    async def generate(self, session: aiohttp.ClientSession, body: Mapping[str, Any], timeout_s: float) -> bytes:
        """The reply to one generation; ends at once when the server is given up."""
        if not self.calls:
            self.answered = time.monotonic()
        call = asyncio.ensure_future(self.request(session, "/generate", timeout_s, body))
        self.calls.add(call)
        try:
            await asyncio.wait({call})
        finally:
            self.calls.discard(call)
            call.cancel()
        if call.cancelled():
            raise EngineFault(self.reason, is_lost=True)
        reply = call.result()
        self.answered = time.monotonic()
        return reply

    def give_up(self, reason: str) -> None:
        """Nothing is expected of it any more until it has been looked at again."""
        self.is_ready, self.reason = False, reason
        self.put_off()
        for call in self.calls:
            call.cancel()

    def put_off(self) -> None:
        """Send nothing for a while; longer each time it fails in a row."""
        self.failures += 1
        self.not_before = time.monotonic() + min(0.25 * 2**self.failures, 30.0)

    async def probe(self, session: aiohttp.ClientSession, timeout_s: float) -> None:
        """Ask something that its scheduler answers between two tokens, also while it is paused.

        Raises:
            EngineFault: it did not.
        """
        with contextlib.suppress(ValueError):  # a refusal is an answer
            await self.request(session, "/server_info", timeout_s, method="GET")


def request_body(request: GenerationRequest, *, version: int | None, wants_kept_mass: bool) -> dict[str, Any]:
    """What `/generate` gets. The seed stays here: SGLang draws its own numbers unless it runs deterministically."""
    sampling: dict[str, Any] = {
        "max_new_tokens": request.max_new_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k or -1,
        "stop_token_ids": list(request.stop_token_ids),
    }
    return {
        "input_ids": request.prompt_tokens.tolist(),
        "sampling_params": sampling,
        "return_logprob": True,
        # Keys and values of a prompt are shared between requests of the same weights only.
        "extra_key": f"weights-{version}",
        **({"return_sampling_mask": True} if wants_kept_mass else {}),
    }


def is_filtered(request: GenerationRequest) -> bool:
    """Whether top_k or top_p take anything away."""
    return request.temperature > 0 and (request.top_p < 1 or request.top_k > 0)


def parse_reply(content: bytes, request: GenerationRequest, attempt: int) -> Completion:
    """A reply of `/generate` as a completion.

    Raises:
        EngineFault: it was aborted, is no such reply, or has tokens of unknown weights.
    """
    try:
        reply = json.loads(content)
        info = reply["meta_info"]
        reason = info["finish_reason"]["type"]
        tokens = np.array(reply["output_ids"], dtype=np.int32)
        logprobs = np.array([row[0] for row in info["output_token_logprobs"]], dtype=np.float32)
        spans = [(int(s["start"]), s["version"]) for s in info["weight_versions"]]
    except (KeyError, TypeError, ValueError, IndexError) as e:
        raise EngineFault(f"/generate: got a reply that is none ({e!r}): {content[:200]!r}") from e
    if reason not in ("stop", "length"):
        raise EngineFault(f"/generate: the response was aborted after {len(tokens)} tokens ({info['finish_reason']})")
    if not len(tokens) or len(tokens) != len(logprobs) or not np.isfinite(logprobs).all():
        raise EngineFault(
            f"/generate: got {len(tokens)} tokens and {np.isfinite(logprobs).sum()} finite logprobs, need one a token"
        )
    versions = [_version(text) for _, text in spans]
    starts = [start for start, _ in spans]
    return Completion(
        index=request.index,
        tokens=tokens,
        logprobs=logprobs,
        finish_reason=reason,
        kept_mass=_kept_mass(info, logprobs, request),
        policy_version=min(versions),
        version_spans=tuple(zip(starts, versions, strict=True)) if len(spans) > 1 else (),
        attempts=attempt,
    )


def _version(text: str) -> int:
    if not text.isdigit():
        raise EngineFault(f"/generate: got tokens of weights {text!r}, need those of a policy version", is_lost=True)
    return int(text)


def _kept_mass(info: Mapping[str, Any], logprobs: np.ndarray, request: GenerationRequest) -> float:
    """Mean mass that the filters kept: a token's probability before them over that after them; NaN if not asked."""
    if not is_filtered(request):
        return 1.0
    after = info.get("output_token_sampling_logprobs")
    if after is None or len(after) != len(logprobs):
        return float("nan")
    return float(np.exp(logprobs - np.array(after, dtype=np.float32)).clip(max=1.0).mean())
