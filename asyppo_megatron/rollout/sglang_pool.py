"""The servers that generate: which are usable, which is least busy, and how one that failed comes back.

Everything here runs in one event loop, so nothing needs a lock.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from pathlib import Path

import aiohttp

from asyppo_megatron.config import SGLangConfig
from asyppo_megatron.rollout.discovery import EngineFinder
from asyppo_megatron.rollout.sglang_server import EngineFault, Server
from asyppo_megatron.types import RunError

log = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 60.0  # for what a server answers between two tokens
FLUSH_TIMEOUT_S = 60.0
WATCH_S = 0.5
_SEARCH_S = 1.0  # between two looks for servers while none is ready


class EngineError(RunError):
    """Generation cannot go on: no engine is usable, or a response failed too often."""


class ServerPool:
    """Servers, their weights and their health.

    Args:
        config: how patient to be.
        finder: knows the servers of now; those that are gone are dropped.
        pause_mode: what happens to requests under way when new weights come, in SGLang's words.
    """

    def __init__(
        self,
        config: SGLangConfig,
        session: aiohttp.ClientSession,
        finder: EngineFinder,
        pause_mode: str,
    ):
        self._config, self._session, self._finder, self._mode = config, session, finder, pause_mode
        self._servers: dict[str, Server] = {}
        self._weights: tuple[Path | None, int] | None = None
        self._changed = asyncio.Condition()
        self._none_since = time.monotonic()  # since when no server is ready
        self._watch: asyncio.Task[None] | None = None
        self._reviving: dict[Server, asyncio.Task[None]] = {}
        self._is_paused = False
        self.is_updating = False  # another transport is at the servers, which may be silent meanwhile
        self.lost = 0  # servers given up since last asked

    @property
    def ready(self) -> list[Server]:
        return [s for s in self._servers.values() if s.is_ready]

    @property
    def needs_weights(self) -> bool:
        """Whether a server came back without the current weights, and only another weight sync can bring them."""
        if self._weights is None or self._weights[0] is not None:
            return False
        return any(s.lacks_weights for s in list(self._servers.values()))  # a copy: the loop may change it meanwhile

    async def start(self) -> None:
        self._watch = asyncio.create_task(self._watch_servers())

    async def close(self) -> None:
        for task in [self._watch, *self._reviving.values()]:
            if task is not None:
                task.cancel()

    # --- dispatch

    async def acquire(self) -> Server:
        """The least busy server, once there is one; the caller releases it.

        Raises:
            EngineError: none was usable for too long.
        """
        async with self._changed:
            while True:
                now = time.monotonic()
                usable = [s for s in self.ready if self._takes_more(s, now)]
                if usable:
                    server = min(usable, key=lambda s: s.in_flight)
                    server.in_flight += 1
                    return server
                if not self.ready and now - self._none_since > self._config.patience_s:
                    raise EngineError(self._none_usable())
                await self._changed.wait()  # the watch wakes all when nothing else does

    def _takes_more(self, server: Server, now: float) -> bool:
        is_free = server.in_flight < self._config.max_concurrency and server.not_before <= now
        return is_free and not server.lock.locked()  # while its weights change, what it does must not change

    async def release(self, server: Server) -> None:
        server.in_flight -= 1
        async with self._changed:
            self._changed.notify(1)

    def _none_usable(self) -> str:
        lost = [f"{s.url}: {s.reason}" for s in self._servers.values() if not s.is_ready]
        found = "; ".join([*lost, *self._finder.missing]) or "none is known"
        return (
            f"engines: none usable for {self._config.patience_s:.0f} s (rollout.sglang.patience_s): {found}; "
            "see the engines' logs"
        )

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def fail(self, server: Server, fault: EngineFault) -> None:
        """A request to a server failed: put it off, or give it up when it is lost."""
        if server.is_ready or not fault.is_lost:  # the requests that are lost with it say nothing new
            log.warning("engine %s: %s", server.url, fault)
        if not fault.is_lost:
            server.put_off()
        elif server.is_ready:
            self._give_up(server, str(fault))
        await self._tell()

    def _give_up(self, server: Server, reason: str) -> None:
        was_ready = server.is_ready
        server.give_up(reason)
        self.lost += was_ready
        if was_ready and not self.ready:
            self._none_since = time.monotonic()

    # --- weights

    async def load(self, path: Path | None, version: int) -> None:
        """Give every server the weights of a directory, or none where another transport has brought them.

        Where the only servers have lost the latter since, waiting would not bring them: `needs_weights` then says so.

        Raises:
            EngineError: no server could take them in time.
        """
        self._weights = (path, version)
        await self._find_servers()
        deadline = time.monotonic() + self._config.patience_s
        while True:
            await asyncio.gather(*(self._bring(s) for s in self._servers.values()))
            if self.ready or self.needs_weights:
                await self._tell()
                return
            if time.monotonic() > deadline:
                raise EngineError(f"weights of version {version}: {self._none_usable()}")
            await asyncio.sleep(WATCH_S)
            await self._find_servers()

    async def found(self) -> list[str]:
        """Every server there is now, once there is one.

        Raises:
            EngineError: none appeared in time.
        """
        deadline = time.monotonic() + self._config.patience_s
        await self._find_servers()
        while not self._servers:
            if time.monotonic() > deadline:
                raise EngineError(self._none_usable())
            await asyncio.sleep(_SEARCH_S)
            await self._find_servers()
        return list(self._servers)

    def keep_at(self, path: Path | None) -> None:
        """Where servers that come back find the current weights; None: nowhere until the next update."""
        if path is not None and self._weights is not None:
            self._weights = (path, self._weights[1])

    async def _bring(self, server: Server) -> None:
        """Make a server usable with the current weights, or note why it is not."""
        async with server.lock:
            assert self._weights is not None
            if not (server.is_ready and server.version == self._weights[1]):
                await self._bring_alone(server, *self._weights)
        await self._tell()  # only now that it takes requests again

    async def _bring_alone(self, server: Server, path: Path | None, version: int) -> None:
        server.lacks_weights = False
        try:
            if path is not None:
                await self._update(server, path, version)
            elif (found := await self._held(server)) != str(version):
                server.lacks_weights = True
                raise EngineFault(f"holds weights {found!r}, need {version}; they come with the next weight sync")
        except (EngineFault, ValueError) as e:
            if server.reason != str(e):
                log.warning("engine %s: %s", server.url, e)
            self._give_up(server, str(e))
            return
        if not server.is_ready:
            log.info("engine %s: ready with weights of version %d", server.url, version)
        server.version, server.is_ready, server.reason, server.failures = version, True, "", 0
        server.not_before = 0.0

    async def _held(self, server: Server) -> str:
        info = await server.request(self._session, "/model_info", ANSWER_TIMEOUT_S, method="GET")
        return str(json.loads(info).get("weight_version"))

    async def _update(self, server: Server, path: Path, version: int) -> None:
        """Weights from a directory, with what is under way paused around it."""
        was_ready = server.is_ready
        has_work = was_ready and server.in_flight > 0
        if has_work and not server.is_paused:
            await self._post(server, "/pause_generation", {"mode": self._mode})
        elif not was_ready:  # an update may have been cut off, or another client paused it
            await self._post(server, "/continue_generation", {})
        keeps_cache = has_work and not server.is_paused and self._mode == "in_place"
        body = {"model_path": str(path), "weight_version": str(version), "flush_cache": False}
        await self._post(server, "/update_weights_from_disk", body, self._config.start_timeout_s)
        if not keeps_cache:
            await self._flush(server)
        if has_work and not server.is_paused:
            await self._post(server, "/continue_generation", {})
        if self._is_paused and not server.is_paused:
            await self._post(server, "/pause_generation", {"mode": "retract"})
            server.is_paused = True

    async def _flush(self, server: Server) -> None:
        """Drop keys and values of old weights; refused while requests that were given up are still being removed."""
        deadline = time.monotonic() + FLUSH_TIMEOUT_S
        while True:
            try:
                await self._post(server, "/flush_cache", None)
                return
            except ValueError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.05)

    async def _post(self, server: Server, path: str, body: object, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        await server.request(self._session, path, timeout_s, body)  # type: ignore[arg-type]

    # --- pauses

    async def pause(self) -> None:
        """Requests under way leave the device and wait in their servers; their caches are dropped."""
        self._is_paused = True
        await asyncio.gather(*(self._pause(s) for s in self.ready if not s.is_paused))

    async def _pause(self, server: Server) -> None:
        try:
            await self._post(server, "/pause_generation", {"mode": "retract"})
            server.is_paused = True
            await self._flush(server)
        except (EngineFault, ValueError) as e:
            await self.fail(server, EngineFault(str(e), is_lost=True))

    async def resume(self) -> None:
        self._is_paused = False
        for server in self._servers.values():
            if server.is_paused:
                server.is_paused = False
                try:
                    await self._post(server, "/continue_generation", {})
                except (EngineFault, ValueError) as e:
                    await self.fail(server, EngineFault(str(e), is_lost=True))
        await self._tell()

    # --- health

    async def _find_servers(self) -> None:
        found = await asyncio.to_thread(self._finder.find)
        for url, incarnation in found:
            server = self._servers.setdefault(url, Server(url, incarnation=incarnation))
            if server.incarnation != incarnation:
                if server.is_ready:
                    await self.fail(server, EngineFault("its process is another one", is_lost=True))
                server.incarnation, server.version = incarnation, None
        for url in set(self._servers) - {url for url, _ in found}:
            server = self._servers[url]
            if server.is_ready:
                await self.fail(server, EngineFault("its agent no longer has it", is_lost=True))
            del self._servers[url]

    async def _watch_servers(self) -> None:
        """Look at silent servers, bring back lost ones, hear of new ones, wake those who wait."""
        searched = time.monotonic()
        while True:
            await asyncio.sleep(WATCH_S)
            now = time.monotonic()
            if not self.ready or any(s.not_before > now - 2 * WATCH_S for s in self.ready):
                await self._tell()
            patience = self._config.health_interval_s if self.ready else _SEARCH_S
            if self.is_updating:
                continue
            if now - searched > patience and self._weights is not None:
                searched = now
                await self._find_servers()
            for server in list(self._servers.values()):
                if server in self._reviving and not self._reviving[server].done():
                    continue
                if not server.is_ready and self._weights is not None and server.not_before <= now:
                    self._reviving[server] = asyncio.create_task(self._bring(server))
                elif self._is_silent(server, now):
                    self._reviving[server] = asyncio.create_task(self._probe(server))

    def _is_silent(self, server: Server, now: float) -> bool:
        waits = server.is_ready and bool(server.calls) and not server.is_paused and not self.is_updating
        return waits and now - server.answered > self._config.health_interval_s

    async def _probe(self, server: Server) -> None:
        try:
            await server.probe(self._session, self._config.health_timeout_s)
            server.answered = time.monotonic()
        except EngineFault as e:
            if not server.is_paused and not self.is_updating:
                await self.fail(server, EngineFault(f"hangs: {e}", is_lost=True))
