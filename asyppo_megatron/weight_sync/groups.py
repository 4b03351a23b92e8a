"""Communication groups of one sender and the GPUs of some engines, outside the training world."""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from asyppo_megatron.weight_sync.engines import EngineError, Request, call

_FAREWELL_S = 20.0


class UpdateGroup:
    """Rank 0 is this process, the others are the tp ranks of the engines, in order.

    Making it is a collective of all of them. It is no group of torch's world: an error in it, or its end, leaves the
    trainer's groups alone.

    Args:
        name: known to the engines; no two groups that live at once share it.
        engines: (url, tp size) of each.
    """

    def __init__(self, name: str, engines: list[tuple[str, int]], *, device: torch.device, timeout_s: float):
        self.name, self.urls, self.timeout_s = name, [url for url, _ in engines], timeout_s
        host = _own_address(self.urls)
        size = 1 + sum(tp for _, tp in engines)
        backend = "nccl" if device.type == "cuda" else "gloo"
        self._is_named = backend == "nccl"
        timeout = timedelta(seconds=timeout_s)
        tcp = dist.TCPStore(host, 0, size, is_master=True, wait_for_workers=False, timeout=timeout)
        asked, offset = [], 1
        for url, tp in engines:
            body = {
                "master_address": host,
                "master_port": tcp.port,
                "rank_offset": offset,
                "world_size": size,
                "group_name": name,
                "backend": backend,
            }
            asked.append(Request(url, "POST", "/init_weights_update_group", body, timeout_s))
            offset += tp
        self._pg: Any = join(backend, dist.PrefixStore(name, tcp), size, name, timeout)
        self._store = tcp  # the group's rendezvous lives as long as the group
        for request in asked:
            request.answer()

    def broadcast(self, flat: torch.Tensor) -> None:
        """This process's bytes to every engine; returns when the buffer may be written again."""
        broadcast(self._pg, flat)

    def close(self) -> None:
        """Leave the group, also after an error: what waits in it, here or in an engine, ends with an error."""
        if self._pg is None:
            return
        pg, self._pg = self._pg, None
        if self._is_named:
            pg.abort()
            dist.destroy_process_group(pg)
        del pg  # the last reference of a gloo group closes its connections
        for url in self.urls:
            try:
                call(url, "/destroy_weights_update_group", _FAREWELL_S, {"group_name": self.name})
            except EngineError:
                continue  # it is gone, or has forgotten the group with the process that knew it


def join(backend: str, store: dist.Store, size: int, name: str, timeout: timedelta, rank: int = 0) -> Any:
    """The group as SGLang's `init_custom_process_group` makes it: both sides must use the same keys of the store.

    gloo connects at once, as the engines do: the trainer's own groups connect on first use, which the other side of a
    connection has to know.
    """
    if backend == "gloo":
        options = dist.ProcessGroupGloo._Options()
        options._timeout = timeout
        options._devices = [dist.ProcessGroupGloo.create_default_device(lazy_init=False)]
        # The keys that torch's helper for named groups uses, with which the engines join.
        keys = dist.PrefixStore("cpu/", dist.PrefixStore(f"{name}/", store))
        return dist.ProcessGroupGloo(keys, rank, size, options)
    pg, _ = c10d._new_process_group_helper(
        size, rank, [], dist.Backend(backend), store, group_name=name, backend_options=None, timeout=timeout
    )
    c10d._world.pg_group_ranks[pg] = {r: r for r in range(size)}
    return pg


def broadcast(pg: Any, flat: torch.Tensor) -> None:
    """Rank 0's bytes to all of the group; returns when the buffer may be used again."""
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    pg.broadcast([flat], options).wait()
    if flat.device.type == "cuda":
        torch.cuda.current_stream(flat.device).synchronize()


def _own_address(urls: list[str]) -> str:
    """This node's address as the engines reach it: loopback when all of them are there."""
    hosts = [urlsplit(url).hostname or "" for url in urls]
    if all(h == "localhost" or h.startswith("127.") for h in hosts):
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((hosts[0], 9))  # no packet is sent, only a route chosen
        return str(probe.getsockname()[0])
