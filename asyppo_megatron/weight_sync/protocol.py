"""The leading rank's sessions with the engines: pause, flush, begin ... end, compare, name the version, continue."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from asyppo_megatron.models.spec import ModelSpec
from asyppo_megatron.weight_sync.checksum import Checksums, Sample, compare
from asyppo_megatron.weight_sync.collective import GroupPlan, plan_groups
from asyppo_megatron.weight_sync.disk import version_directory
from asyppo_megatron.weight_sync.engines import (
    EngineError,
    EngineRefusal,
    EngineState,
    EngineTarget,
    call,
    describe,
    wait_until_flushed,
)
from asyppo_megatron.weight_sync.ipc import Neighbour
from asyppo_megatron.weight_sync.orders import SyncOptions

log = logging.getLogger(__name__)

_PROBE_S = 30.0  # an engine that does not describe itself in this time is not there
_POLL_S = 1.0
_EARLY, _LATE = ("weights",), ("kv_cache", "cuda_graph")  # an engine's memory: before and after its new weights
_RELEASED = "released"  # weight version of an engine without its memory
_PARALLEL = 64  # engines spoken to at once


@dataclass(frozen=True)
class Engine:
    target: EngineTarget
    state: EngineState

    @property
    def url(self) -> str:
        return self.target.url


class EngineSessions:
    """The engines of one push after the other.

    Attributes:
        engines: those that take part, by URL.
        groups: of the last pass, for all engines that take the collective.
    """

    def __init__(self, options: SyncOptions, targets: Callable[[int], Sequence[EngineTarget]]):
        self.options, self._targets = options, targets
        self.engines: dict[str, Engine] = {}
        self._all: list[str] = []  # every engine that was there at the last push
        self.groups: list[GroupPlan] = []
        self._holds: dict[str, tuple[str, int]] = {}  # url -> (incarnation, version) of what we brought it
        self._version = 0  # of the last push

    @property
    def urls(self) -> list[str]:
        return list(self.engines)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(sorted({e.state.tp for e in self.engines.values()}))

    @property
    def dtype(self) -> str:
        return next(iter(self.engines.values())).state.dtype

    def open(self, policy_version: int) -> None:
        """Find the engines that are there and do not have this version yet.

        Raises:
            EngineError: there is none in time, or one that cannot be updated.
        """
        deadline = time.monotonic() + self.options.timeout_s
        while True:
            targets = list(self._targets(policy_version))
            found, lost = self._describe(targets)
            if found or time.monotonic() > deadline:
                break
            time.sleep(_POLL_S)
        if not found:
            said = lost[0] if lost else "none is configured"
            raise EngineError(f"weight sync of policy version {policy_version}: no engine to send weights to: {said}")
        for text in lost:
            log.warning("weight sync: %s; it gets the next version", text)
        dtypes = {e.state.dtype for e in found.values()}
        if len(dtypes) > 1:
            raise EngineError(f"engines: got dtypes {sorted(dtypes)}, need one; start all with the same dtype")
        self._all = list(found)
        self.engines = {
            url: e for url, e in found.items() if self._holds.get(url) != (e.state.incarnation, policy_version)
        }

    def _describe(self, targets: Sequence[EngineTarget]) -> tuple[dict[str, Engine], list[str]]:
        found, lost = {}, []
        for target in targets:
            try:
                found[target.url] = Engine(target, describe(target.url, min(_PROBE_S, self.options.timeout_s)))
            except EngineError as e:
                if not e.lost:
                    raise
                lost.append(str(e))
        return found, lost

    def begin(self) -> None:
        """Pause the engines and open their sessions; one that is lost meanwhile is left out."""
        self._each(self.urls, self._begin_one)
        if not self.engines:
            raise EngineError("weight sync: every engine was lost while it was being paused; see the engines' logs")

    def _each(self, urls: Sequence[str], action: Callable[[str], int | None]) -> int:
        """Do something with several engines at once; one that is lost is left out of this push. Sums the results."""
        total = 0
        with ThreadPoolExecutor(max(1, min(len(urls), _PARALLEL)), thread_name_prefix="weight-sync-engines") as pool:
            for url, future in [(url, pool.submit(action, url)) for url in urls]:
                try:
                    total += future.result() or 0
                except EngineError as e:
                    if not e.lost:
                        raise
                    log.warning("weight sync: %s; it gets the next version", e)
                    self.engines.pop(url, None)
        return total

    def _pause(self, url: str) -> None:
        limit = self.options.timeout_s
        call(url, "/pause_generation", limit, {"mode": self.options.pause_mode})
        # Requests that are paused in place keep what the old weights computed: then the cache stays, and says so.
        patience = 0.0 if self.options.pause_mode == "in_place" else limit
        try:
            wait_until_flushed(url, limit, patience)
        except EngineRefusal:
            if patience:
                raise

    def release(self) -> None:
        """Have the engines give up their memory; on return they have, or are gone.

        Raises:
            EngineError: one refuses.
        """

        def give_up(url: str) -> None:
            limit = self.options.timeout_s
            state = describe(url, limit)
            if state.weight_version == _RELEASED:
                return
            call(url, "/pause_generation", limit, {"mode": "retract"})
            wait_until_flushed(url, limit, limit)
            # An engine does not say whether it has its memory, and does not survive being given it twice: its version
            # says so, also to a trainer that starts anew.
            self._name_version(url, _RELEASED)
            if state.on_gpu:
                call(url, "/release_memory_occupation", limit, {"tags": [*_EARLY, *_LATE]})

        self._each(self._all, give_up)

    def _resume_weights(self, url: str) -> None:
        """An engine that gave up its memory gets back the part that the new weights need."""
        if self._is_released(url):
            call(url, "/resume_memory_occupation", self.options.timeout_s, {"tags": list(_EARLY)})

    def _is_released(self, url: str) -> bool:
        """Whether an engine had no memory when this push began."""
        state = self.engines[url].state
        return state.on_gpu and state.weight_version == _RELEASED

    def _name_version(self, url: str, name: str) -> None:
        body = {"new_version": name, "abort_all_requests": False}
        call(url, "/update_weight_version", self.options.timeout_s, body)

    def wake(self) -> None:
        """Let the engines of the last push go on, with all of their memory and under their new version."""

        def go_on(url: str) -> None:
            limit = self.options.timeout_s
            if self._is_released(url):
                call(url, "/resume_memory_occupation", limit, {"tags": list(_LATE)})
            self._name_version(url, str(self._version))
            call(url, "/continue_generation", limit, {})

        self._each(self.urls, go_on)

    def _begin_one(self, url: str) -> None:
        self._pause(url)
        self._resume_weights(url)
        limit = self.options.timeout_s
        try:
            call(url, "/begin_weight_update", limit, {"selector": "all"})
        except EngineRefusal as e:
            if e.status == 404:
                raise EngineError(
                    f"engine {url}: got a server without begin_weight_update, need SGLang >= 0.5.23; upgrade it, or "
                    "set weight_sync.transport=disk"
                ) from e
            log.info("weight sync: %s; ending the session that was left open", e)
            call(url, "/end_weight_update", limit, {})
            call(url, "/begin_weight_update", limit, {"selector": "all"})

    def assign(self, urls: Sequence[str], ranks: Mapping[str, int]) -> tuple[list[GroupPlan], list[Neighbour]]:
        """Which transport serves which engine.

        Args:
            urls: engines of this pass.
            ranks: the actor's world rank on each GPU, by the GPU's name; empty on a CPU.
        """
        beside, others = [], []
        for url in urls:
            engine = self.engines[url]
            owners = self._owners(engine, ranks)
            if self.options.transport == "ipc" and owners is None:
                raise EngineError(
                    f"weight_sync.transport: got ipc for engine {url}, whose GPUs {list(engine.target.gpus)} the "
                    "actor's ranks do not share; set weight_sync.transport=auto"
                )
            if owners is not None and self.options.transport != "collective":
                beside.append(Neighbour(url, owners))
            else:
                others.append((url, engine.state.tp, engine.state.incarnation))
        groups = plan_groups(others)
        if set(urls) == set(self.engines):
            self.groups = groups
        return groups, beside

    def _owners(self, engine: Engine, ranks: Mapping[str, int]) -> tuple[int, ...] | None:
        """Whose memory an engine's tp ranks can open; None when there is none."""
        target, tp = engine.target, engine.state.tp
        if not ranks:
            return (-1,) * tp if target.colocated or self.options.transport == "ipc" else None
        if len(target.gpus) == tp and all(gpu in ranks for gpu in target.gpus):
            return tuple(ranks[gpu] for gpu in target.gpus)
        return None

    def revive(self, urls: Sequence[str]) -> list[str]:
        """After a failed pass: which of these engines can take another, restarted ones included."""
        deadline = time.monotonic() + self.options.timeout_s
        before = {url: self.engines.pop(url) for url in urls}
        while True:
            found, lost = self._describe([e.target for e in before.values()])
            if found or self.engines or time.monotonic() > deadline:
                break
            time.sleep(_POLL_S)
        for text in lost:
            log.warning("weight sync: %s; it gets the next version", text)
        if not found and not self.engines:
            raise EngineError(f"weight sync: every engine was lost: {lost[0]}")
        self.engines |= found
        fresh = [u for u, engine in found.items() if engine.state.incarnation != before[u].state.incarnation]
        self._each(fresh, self._begin_one)
        return [url for url in found if url in self.engines]

    def load_from_disk(self, directory: Path, policy_version: int) -> None:
        """Have every engine read a version's directory."""
        path = str(version_directory(directory, policy_version).resolve())
        body = {"model_path": path, "flush_cache": False}

        def load(url: str) -> None:
            self._pause(url)
            self._resume_weights(url)
            call(url, "/update_weights_from_disk", self.options.timeout_s, body)

        self._each(self.urls, load)
        if not self.engines:
            raise EngineError(f"weight sync of policy version {policy_version}: every engine was lost while loading")

    def finish(self, policy_version: int, expected: Checksums, spec: ModelSpec, mode: str) -> int:
        """Close the sessions and compare; name the version and let the engines go on, unless they are colocated.

        Returns:
            How many parameters were compared, over all engines and their ranks.

        Raises:
            WeightMismatch: an engine holds something else; it stays paused.
        """
        sample = Sample(mode, spec, policy_version)

        def close(url: str) -> int:
            limit = self.options.timeout_s
            compared = 0
            if self.options.transport != "disk":
                call(url, "/end_weight_update", limit, {})
            if mode != "off":
                body = {"action": "checksum", "skip_tensor_list": sample.left_out()}
                answer = call(url, "/weights_checker", limit, body)
                compared = compare(url, policy_version, expected[self.engines[url].state.tp], answer)
            return compared

        total = self._each(self.urls, close)
        self._version = policy_version
        if not self.options.colocated:
            self.wake()
        self._holds |= {u: (e.state.incarnation, policy_version) for u, e in self.engines.items()}
        return total
