"""The SGLang engine: any number of servers behind the protocol that the embedded engine has.

An event loop in a thread of its own holds all connections; `generate` hands it requests and yields what comes back.
A response is asked for once at a time, so none is lost and none comes twice: when a server fails, dies or hangs, its
requests are given up together and asked for again elsewhere, or there once it holds the current weights again.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import uuid
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import aiohttp

from asyppo_megatron.config import RolloutConfig
from asyppo_megatron.rollout.discovery import EngineFinder
from asyppo_megatron.rollout.engine import Completion, GenerationRequest, read_weights_manifest
from asyppo_megatron.rollout.sglang_pool import EngineError, ServerPool
from asyppo_megatron.rollout.sglang_server import (
    MAX_SAMPLING_MASK,
    EngineFault,
    is_filtered,
    parse_reply,
    request_body,
)

T = TypeVar("T")
_PAUSE_MODES = {"carry": "in_place", "requeue": "retract"}
_CALL_MARGIN_S = 60.0
ANSWER_S = 30.0


class SGLangEngine:
    """Generation by SGLang servers.

    Logprobs are of the temperature-scaled softmax over the full vocabulary, as the embedded engine's. Requests' seeds
    have no effect: SGLang draws its own random numbers.

    Args:
        config: sampling filters, concurrency, deadlines.
        finder: knows the servers of now.
        vocab_size: of the model; a token outside it would end a server.
    """

    def __init__(self, config: RolloutConfig, finder: EngineFinder, vocab_size: int):
        self._config, self._finder, self._vocab_size = config, finder, vocab_size
        self._version: int | None = None
        self._counts: Counter[str] = Counter()
        self._name = uuid.uuid4().hex[:12]  # request ids of this engine are nobody else's
        self._number = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engines", daemon=True)
        self._thread.start()
        self._session, self._pool = self._call(self._open(), ANSWER_S)

    async def _open(self) -> tuple[aiohttp.ClientSession, ServerPool]:
        session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), auto_decompress=False)
        pool = ServerPool(self._config.sglang, session, self._finder, _PAUSE_MODES[self._config.on_update])
        await pool.start()
        return session, pool

    def _call(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    @property
    def policy_version(self) -> int | None:
        return self._version

    @property
    def needs_weights(self) -> bool:
        return self._pool.needs_weights

    def load_weights(self, path: Path, policy_version: int) -> None:
        """Have every server take the weights of a directory that it can read; responses under way go on with them.

        Raises:
            ValueError: the directory is incomplete or of another version.
            EngineError: no server could take them.
        """
        read_weights_manifest(path, policy_version)
        self._load(path, policy_version)

    def begin_update(self) -> list[str]:
        """Another transport is about to pause the servers and change their weights; the URLs of those there are."""
        return self._call(self._begin_update(), self._config.sglang.patience_s + _CALL_MARGIN_S)

    async def _begin_update(self) -> list[str]:
        urls = await self._pool.found()
        self._pool.is_updating = True
        return urls

    def end_update(self, policy_version: int, path: Path | None = None) -> None:
        """It has brought weights of this version; servers that do not have them are used no more.

        Args:
            path: a directory of these weights, for servers that come back before the next update.

        Raises:
            EngineError: none is reachable; one that is and has other weights makes `needs_weights` true.
        """
        try:
            self._load(None, policy_version)
        finally:
            self._pool.is_updating = False
        self._pool.keep_at(path)

    def _load(self, path: Path | None, policy_version: int) -> None:
        config = self._config.sglang
        limit = config.patience_s + config.start_timeout_s + _CALL_MARGIN_S
        self._call(self._pool.load(path, policy_version), limit)
        self._version = policy_version

    def generate(self, requests: Sequence[GenerationRequest]) -> Iterator[Completion]:
        """Completions as they finish, in any order.

        Raises:
            EngineError: no engine is usable, or one response failed too often; names engines and causes.
        """
        if self._version is None:
            raise RuntimeError("SGLang engine: got a request before any weights; call load_weights first")
        for request in requests:
            self._check(request)
        arrived: queue.SimpleQueue[Completion | BaseException] = queue.SimpleQueue()
        work = asyncio.run_coroutine_threadsafe(self._generate_all(requests, arrived), self._loop)
        try:
            for _ in requests:
                item = arrived.get()
                if isinstance(item, BaseException):
                    raise item
                self._counts["rollout/reissued"] += item.attempts - 1
                yield item
        finally:
            work.cancel()

    def _check(self, request: GenerationRequest) -> None:
        tokens = request.prompt_tokens
        if len(tokens) == 0 or request.max_new_tokens < 1:
            raise ValueError(f"request {request.index}: got an empty prompt or no room for a response, need >= 1 token")
        if tokens.min() < 0 or tokens.max() >= self._vocab_size:
            raise ValueError(f"request {request.index}: got token ids outside the model's {self._vocab_size}")

    async def _generate_all(
        self, requests: Sequence[GenerationRequest], arrived: queue.SimpleQueue[Completion | BaseException]
    ) -> None:
        async def one(request: GenerationRequest) -> None:
            arrived.put(await self._generate_one(request))

        try:
            async with asyncio.TaskGroup() as group:
                for request in requests:
                    group.create_task(one(request))
        except* Exception as errors:
            arrived.put(_first(errors))

    async def _generate_one(self, request: GenerationRequest) -> Completion:
        """One response, asked for again as often as is allowed."""
        config = self._config.sglang
        every = config.kept_mass_every
        wants_kept_mass = bool(every) and request.index % every == 0 and is_filtered(request)
        wants_kept_mass &= 0 < request.top_k <= MAX_SAMPLING_MASK
        self._number += 1
        rid = f"{self._name}-{self._number}"
        faults: list[str] = []
        for attempt in range(1, config.max_attempts + 1):
            server = await self._pool.acquire()
            body = request_body(request, version=server.version, wants_kept_mass=wants_kept_mass)
            try:
                reply = await server.generate(
                    self._session, {**body, "rid": f"{rid}-{attempt}"}, config.request_timeout_s
                )
                completion = parse_reply(reply, request, attempt)
                server.failures = 0
                return completion
            except EngineFault as e:
                faults.append(f"{server.url}: {e}")
                await self._pool.fail(server, e)
            finally:
                await self._pool.release(server)
        raise EngineError(
            f"a response failed {config.max_attempts} times (rollout.sglang.max_attempts), at last on engine "
            f"{faults[-1]}; before that: {'; '.join(faults[:-1]) or 'nothing'}"
        )

    def pause(self) -> None:
        self._call(self._pool.pause(), 2 * _CALL_MARGIN_S)

    def resume(self) -> None:
        self._call(self._pool.resume(), 2 * _CALL_MARGIN_S)

    def statistics(self) -> dict[str, float]:
        counts = {
            "rollout/reissued": self._counts.pop("rollout/reissued", 0),
            "rollout/engines_lost": self._pool.lost,
            "rollout/engines": len(self._pool.ready),
        }
        self._pool.lost = 0
        return counts

    def close(self) -> None:
        """Hang up; the servers end what is under way by themselves."""

        async def end() -> None:
            await self._pool.close()
            await self._session.close()

        self._call(end(), ANSWER_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(ANSWER_S)


def _first(group: BaseExceptionGroup[Exception]) -> Exception:
    """The first plain error of a group."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, Exception)
    return error
