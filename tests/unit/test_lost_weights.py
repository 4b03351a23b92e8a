"""An engine that ended between two weight syncs and came back empty: the ranks push again while they wait."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import torch.distributed as dist
from driver_runs import GROUPS, SAMPLES, Drivers, configure, make_demo

from asyppo_megatron.observability.board import StatusBoard
from asyppo_megatron.rollout.client import RolloutError
from asyppo_megatron.rollout.source import DriverSource

pytest.importorskip("aiohttp", reason="comes with SGLang")


class Replies(ThreadingHTTPServer):
    """Answers as a server with weights of `version` does."""

    version = "0"

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Replies

    def do_GET(self) -> None:
        self._answer({"weight_version": self.server.version})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        version = self.server.version
        info = {
            "finish_reason": {"type": "length"},
            "weight_version": version,
            "weight_versions": [{"version": version, "start": 0, "end": 2}],
            "output_token_logprobs": [[-1.0, 3, None], [-0.5, 4, None]],
        }
        self._answer({"text": "12", "output_ids": [3, 4], "meta_info": info})

    def _answer(self, body: object) -> None:
        content = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def drivers() -> Iterator[Drivers]:
    drivers = Drivers()
    yield drivers
    drivers.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def test_the_same_weights_are_pushed_again_while_the_ranks_wait_and_the_batch_is_whole(drivers, tmp_path):
    demo = make_demo(tmp_path / "demo")
    replies = Replies()
    sglang = {"urls": [replies.url], "max_attempts": 20, "patience_s": 60.0}
    handle = drivers.start(configure(demo, rollout={"engine": "sglang", "sglang": sglang}), tmp_path)
    threading.Thread(target=replies.serve_forever, daemon=True).start()
    store = dist.HashStore()
    dist.init_process_group("gloo", store=dist.PrefixStore("world", store), rank=0, world_size=1)
    source = DriverSource(handle, tmp_path, store, torch.device("cpu"), 60.0, StatusBoard(1).slot(0), 60.0)
    pushed = []

    def push() -> None:
        with pytest.raises(RolloutError, match="are under way"):
            source.begin_update(1)  # other weights would make a batch of two versions
        assert source.begin_update(0) == [replies.url]
        replies.version = "0"
        source.end_update(0)
        pushed.append(time.monotonic())

    try:
        assert source.begin_update(0) == [replies.url]
        source.end_update(0)
        replies.version = "default"  # its process is another one
        source.start(0, 0)
        batch = source.next_batch(0, push)
        assert batch is not None and len(batch.rewards) == GROUPS * SAMPLES and batch.policy_version == 0
        assert len(pushed) == 1
        assert [store.get(f"batch/0/{number}") for number in range(2)] == [b"push", b"ready"]  # for the other ranks
        source.start(1, 0)
        assert source.next_batch(1, push) is not None and len(pushed) == 1, "nothing was lost since"

        source.begin_update(0)
        replies.version = "default"  # it ends after its push, before the driver looks
        source.end_update(0)
        source.start(2, 0)
        assert source.next_batch(2, push) is not None and len(pushed) == 2
        replies.version = "default"
        source.start(3, 0)
        with pytest.raises(RolloutError, match="step 3: engines lost the current weights 8 times"):
            source.next_batch(3, lambda: None)
    finally:
        replies.shutdown()
        replies.server_close()
