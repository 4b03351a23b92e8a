"""What it costs to collect a batch: responses with logprobs from a replay server, through the real driver, to rank 0.

    python benchmarks/collect.py [--responses 2048] [--tokens 8192] [--engines 16] [--seconds 60] [--out FILE]

The replay server stands in for the engines: it answers every generation with a reply of the real shape, at a random
moment within `--seconds`, on as many ports as there are engines. Everything else is the product: driver process,
dispatch, JSON, decoding, verifier, journal, and rank 0's mapping and broadcast. Measured: CPU seconds and peak memory
of rank 0 and of the driver, and how long after the last reply the batch is with rank 0. Bars: rank 0 <= 30 CPU-seconds
and 4 GB.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from machine import describe_machine, peak_memory_gib

from asyppo_megatron.config import build_config
from asyppo_megatron.demo.prepare import prepare_demo
from asyppo_megatron.parallel.exchange import broadcast_batch
from asyppo_megatron.rollout import journal
from asyppo_megatron.rollout.client import start_driver
from asyppo_megatron.rollout.engine import write_weights_manifest

VOCABULARY = 20
GROUP = 32
BAR_CPU_S, BAR_GB = 30, 4
DISTINCT = 8  # different replies; building 2,048 would measure the replay server


def reply(tokens: int, seed: int) -> bytes:
    """A body as SGLang sends it."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, VOCABULARY, tokens).tolist()
    logprobs = (-rng.exponential(1.0, tokens)).astype(np.float32).astype(float).tolist()
    info = {
        "id": f"replay-{seed}",
        "finish_reason": {"type": "length", "length": tokens},
        "prompt_tokens": 8,
        "completion_tokens": tokens,
        "weight_version": "0",
        "weight_versions": [{"version": "0", "start": 0, "end": tokens}],
        "output_token_logprobs": [[logprob, token, None] for logprob, token in zip(logprobs, ids, strict=True)],
    }
    return json.dumps({"text": "0" * tokens, "output_ids": ids, "meta_info": info}).encode()


def replay_server(engines: int, tokens: int, seconds: float, ports: Any, last: Any) -> None:
    """Answer until killed. `last`: monotonic time of the newest reply."""
    from aiohttp import web

    bodies = [reply(tokens, seed) for seed in range(DISTINCT)]

    async def generate(request: web.Request) -> web.Response:
        await request.read()
        await asyncio.sleep(random.random() * seconds)
        last.value = time.monotonic()
        return web.Response(body=random.choice(bodies), content_type="application/json")

    async def other(request: web.Request) -> web.Response:
        await request.read()
        return web.json_response({"success": True})

    async def serve() -> None:
        app = web.Application(client_max_size=1 << 26)
        app.router.add_post("/generate", generate)
        app.router.add_route("*", "/{path:.*}", other)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        found = []
        for _ in range(engines):
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            found.append(site._server.sockets[0].getsockname()[1])
        ports.send(found)
        await asyncio.Event().wait()

    asyncio.run(serve())


def configure(demo: Path, arguments: argparse.Namespace, ports: list[int]) -> Any:
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    model = str(demo / "actor")
    return build_config(
        {
            "actor": {"model": model, "precision": "fp32"},
            "critics": [{"model": model}] * 2,
            "rollout": {
                "engine": "sglang",
                "prompts_per_step": arguments.responses // GROUP,
                "responses_per_prompt": GROUP,
                "max_response_tokens": arguments.tokens,
                "top_p": 1.0,
                "top_k": 0,
                "sglang": {"urls": urls},
            },
            "reward": {"kind": "exact"},
            "data": {
                "train": str(demo / "rl_train.jsonl"),
                "tokenizer": str(demo / "tokenizer"),
                "chat_template": "none",
            },
        }
    )


def collect(handle: Any, run_dir: Path, weights: Path, last: Any) -> dict[str, Any]:
    """One step as rank 0 sees it; times in seconds."""
    handle.client.hello()
    handle.client.load_weights(weights, 0)
    driver = psutil.Process(handle.process.pid)
    before, began = driver.cpu_times(), time.monotonic()
    cpu = time.process_time()
    handle.client.start(0, 0)
    while not handle.client.wait(0, 5.0):
        pass
    arrays, manifest = journal.load_step(run_dir, 0)
    header = (0, 0, arrays["tokens"].size, arrays["rewards"].size)
    batch = broadcast_batch(arrays, header, torch.device("cpu"))
    ended, after = time.monotonic(), driver.cpu_times()
    status = Path(f"/proc/{driver.pid}/status").read_text()
    return {
        "tokens": batch.num_tokens,
        "responses": batch.num_trajectories,
        "rank0_cpu_s": time.process_time() - cpu,
        "rank0_peak_gib": peak_memory_gib(),
        "driver_cpu_s": after.user + after.system - before.user - before.system,
        "driver_peak_gib": int(status.partition("VmHWM:")[2].split()[0]) / 2**20,
        "wall_s": ended - began,
        "after_last_reply_s": ended - last.value,
        "generate_s": manifest["statistics"]["generate_seconds"],
        "verify_s": manifest["statistics"]["verify_seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--engines", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    last = context.Value("d", 0.0)
    server = context.Process(
        target=replay_server, args=(arguments.engines, arguments.tokens, arguments.seconds, theirs, last), daemon=True
    )
    server.start()
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        demo = prepare_demo(directory / "demo").directory
        (directory / "w0").mkdir()
        (directory / "w0" / "model.safetensors").touch()  # nobody reads it: the replay server has no weights
        write_weights_manifest(directory / "w0", 0, ["model.safetensors"])
        handle = start_driver(configure(demo, arguments, ours.recv()), directory / "run", start_method="spawn")
        try:
            store = dist.FileStore(str(directory / "store"), 1)
            dist.init_process_group("gloo", store=store, rank=0, world_size=1)
            result = collect(handle, directory / "run", directory / "w0", last)
            dist.destroy_process_group()
        finally:
            handle.close()
            server.kill()
            server.join()
    result |= {"engines": arguments.engines, "load_before": load, "machine": describe_machine()}
    for name, value in result.items():
        if isinstance(value, int | float):
            print(f"{name:<24}{value:.3f}")
    is_met = result["rank0_cpu_s"] <= BAR_CPU_S and result["rank0_peak_gib"] * 2**30 <= BAR_GB * 1e9
    print(f"bar: rank 0 <= {BAR_CPU_S} CPU-s and {BAR_GB} GB: {'met' if is_met else 'missed'}")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
