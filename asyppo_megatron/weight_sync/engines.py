"""Talking to SGLang servers about their weights: requests with deadlines, answers that are errors by name."""

from __future__ import annotations

import http.client
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from asyppo_megatron.types import RunError

OLDEST = (0, 5, 23)  # of SGLang: the first with begin_weight_update / end_weight_update
_POLL_S = 0.5


class EngineError(RunError):
    """An engine refused, could not be reached, or did not answer in time.

    Attributes:
        lost: the engine is gone or does not answer: another may have taken its place by the next attempt.
    """

    def __init__(self, message: str, *, lost: bool = False):
        super().__init__(message)
        self.lost = lost


@dataclass(frozen=True)
class EngineTarget:
    """One engine as the trainer sees it.

    Attributes:
        url: http://host:port.
        gpus: of its tp ranks, in order, as `devices` names them; empty when unknown or on a CPU.
        colocated: on a CPU: it runs on the actor's machine.
    """

    url: str
    gpus: tuple[str, ...] = ()
    colocated: bool = False


@dataclass(frozen=True)
class EngineState:
    """What an engine says of itself.

    Attributes:
        incarnation: changes when its process is another one.
        weight_version: of the last complete sync, "default" in a new process.
        on_gpu: whether it has memory to give up; SGLang's scheduler on a CPU does not survive being asked to.
    """

    tp: int
    dtype: str
    incarnation: str
    weight_version: str
    on_gpu: bool


class Request:
    """One request on its way; `answer` waits for it."""

    def __init__(self, url: str, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float):
        self.url, self.path, self._timeout_s = url, path, timeout_s
        parts = urlsplit(url)
        self._connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=timeout_s)
        data = json.dumps(body).encode() if body is not None else None
        headers = {"Content-Type": "application/json"} if data is not None else {}
        try:
            self._connection.request(method, path, data, headers)
        except OSError as e:
            self._connection.close()
            raise EngineError(f"engine {url}: {path}: cannot be reached ({e})", lost=True) from e

    def answer(self) -> Any:
        """The answer's JSON (or text).

        Raises:
            EngineError: no answer, or one that is not a success.
        """
        try:
            response = self._connection.getresponse()
            text = response.read().decode(errors="replace")
        except TimeoutError as e:
            raise EngineError(f"engine {self.url}: {self.path}: no answer in {self._timeout_s:.0f} s", lost=True) from e
        except (OSError, http.client.HTTPException) as e:
            raise EngineError(f"engine {self.url}: {self.path}: connection lost ({e!r})", lost=True) from e
        finally:
            self._connection.close()
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        if response.status != http.client.OK:
            said = value.get("message") or value.get("error") or value if isinstance(value, dict) else value
            raise EngineRefusal(f"engine {self.url}: {self.path}: answered {response.status}: {said}", response.status)
        return value


class EngineRefusal(EngineError):
    """An engine answered, but not with a success.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


def call(url: str, path: str, timeout_s: float, body: Mapping[str, Any] | None = None, method: str = "POST") -> Any:
    return Request(url, method, path, body, timeout_s).answer()


def call_all(urls: Sequence[str], path: str, timeout_s: float, body: Mapping[str, Any] | None = None) -> None:
    """The same request to several engines at once; raises the first error after all have answered."""
    errors: list[EngineError] = []
    requests = []
    for url in urls:
        try:
            requests.append(Request(url, "POST", path, body, timeout_s))
        except EngineError as e:
            errors.append(e)
    for request in requests:
        try:
            request.answer()
        except EngineError as e:
            errors.append(e)
    if errors:
        raise errors[0]


def describe(url: str, timeout_s: float) -> EngineState:
    """What an engine is, checked for what a sync needs.

    Raises:
        EngineError: it is not reachable, too old, or laid out in a way that cannot be updated.
    """
    info = call(url, "/server_info", timeout_s, method="GET")
    version = str(info.get("version", "unknown"))
    found = tuple(int(n) for n in re.findall(r"\d+", version)[:3])
    if len(found) == 3 and found < OLDEST:
        raise EngineError(
            f"engine {url}: got SGLang {version}, need >= {'.'.join(map(str, OLDEST))}, whose servers take weights "
            "between begin_weight_update and end_weight_update; upgrade it, or set weight_sync.transport=disk"
        )
    for key in ("dp_size", "pp_size"):
        if info.get(key, 1) != 1:
            raise EngineError(
                f"engine {url}: got {key} {info[key]}, need 1 for a weight sync; start more engines with tp instead"
            )
    weight_version = str(call(url, "/model_info", timeout_s, method="GET").get("weight_version"))
    return EngineState(
        tp=int(info["tp_size"]),
        dtype=str(info["dtype"]),
        incarnation=json.dumps(info.get("startup_time")),
        weight_version=weight_version,
        on_gpu=info.get("device") != "cpu",
    )


def wait_until_flushed(url: str, timeout_s: float, patience_s: float) -> None:
    """Empty an engine's cache of what the old weights computed; refused while a request runs.

    Raises:
        EngineRefusal: still refused after `patience_s`.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            call(url, "/flush_cache", timeout_s)
            return
        except EngineRefusal:
            if time.monotonic() > deadline:
                raise
        time.sleep(_POLL_S)
