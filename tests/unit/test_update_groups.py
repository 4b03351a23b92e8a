"""The group of a sender and an engine, where the trainer's own gloo groups connect lazily."""

from __future__ import annotations

import subprocess
import sys
import textwrap

ENGINE = """
import sys, torch, torch.distributed as dist
from datetime import timedelta
from torch.distributed import distributed_c10d as c10d
store = dist.PrefixStore("g", dist.TCPStore("127.0.0.1", int(sys.argv[1]), 2, is_master=False))
pg, _ = c10d._new_process_group_helper(
    2, 1, [], dist.Backend("gloo"), store, group_name="g", backend_options=None, timeout=timedelta(seconds=60)
)
c10d._world.pg_group_ranks[pg] = {0: 0, 1: 1}
x = torch.zeros(1000, dtype=torch.uint8)
dist.broadcast(x, group=pg, group_src=0)
print(int(x.sum()))
"""
TRAINER = """
import os, subprocess, sys, torch, torch.distributed as dist
from datetime import timedelta
os.environ["TORCH_GLOO_LAZY_INIT"] = "1"
limit = timedelta(seconds=60)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
dist.barrier()
from asyppo_megatron.weight_sync.groups import broadcast, join
tcp = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
clean = {k: v for k, v in os.environ.items() if k != "TORCH_GLOO_LAZY_INIT"}
engine = subprocess.Popen([sys.executable, "-c", sys.argv[1], str(tcp.port)], stdout=subprocess.PIPE, env=clean)
pg = join("gloo", dist.PrefixStore("g", tcp), 2, "g", limit)
broadcast(pg, torch.ones(1000, dtype=torch.uint8))
print(engine.communicate(timeout=60)[0].decode())
"""


def test_an_engine_that_connects_at_once_meets_a_trainer_that_does_not() -> None:
    command = [sys.executable, "-c", textwrap.dedent(TRAINER), ENGINE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["1000"], done.stderr
