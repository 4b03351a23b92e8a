"""Options and entry of the commands that look at an allocation: `train` on several nodes, `check`, `launch`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from asyppo_megatron.config import load_config


def count(text: str) -> int:
    """An option's value that is a number of things, at least one."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, need a number >= 1")
    return int(text)


def add_place_options(parser: argparse.ArgumentParser) -> None:
    """Options of a launcher that is one of several, each on its node."""
    parser.add_argument("--nodes", type=count, default=1, metavar="N", help="nodes of the run, one launcher on each")
    parser.add_argument("--node", type=int, default=0, metavar="K", help="which of them this is, from 0")
    parser.add_argument("--rendezvous", default="", metavar="HOST:PORT", help="of node 0, for several nodes")
    parser.add_argument("--job", default="", metavar="ID", help="count failed starts of this job, and give up after 3")


def add_check_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--nodes", type=count, default=1, metavar="N")
    parser.add_argument("--gpus-per-node", type=int, metavar="G", help="default: not checked")
    parser.add_argument("--shell", action="store_true", help="print name=value lines for a job script")


def add_launch_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--executor", choices=["local", "slurm"], required=True)
    parser.add_argument("--nodes", type=count, default=1, metavar="N")
    parser.add_argument("--gpus-per-node", type=count, metavar="G", help="default: none are asked for")
    parser.add_argument("--account", default=os.environ.get("SLURM_ACCOUNT", "default"))
    parser.add_argument("--partition")
    parser.add_argument("--time", default="24:00:00", help="time limit of one start (default 24:00:00)")
    parser.add_argument("--container-image", help="for pyxis/enroot")
    parser.add_argument("--container-mounts", nargs="*", default=[], metavar="FROM:TO")
    parser.add_argument("--job-dir", type=Path, help="for NeMo-Run's scripts and logs; default: its home")
    parser.add_argument("--retries", type=int, default=100, metavar="N", help="how often a job is put back (100)")
    parser.add_argument("--dry-run", action="store_true", help="show what would be started")
    parser.add_argument("--follow", action="store_true", help="wait for the end of the job, and show its log")


def launch(arguments: argparse.Namespace) -> int:
    """asyppo launch."""
    from asyppo_megatron.launch import nemo

    a = arguments
    request = nemo.Request(
        config=a.config,
        overrides=tuple(a.overrides),
        executor=a.executor,
        nodes=a.nodes,
        gpus_per_node=a.gpus_per_node,
        account=a.account,
        partition=a.partition,
        time=a.time,
        container_image=a.container_image,
        container_mounts=tuple(a.container_mounts),
        job_dir=a.job_dir,
        retries=a.retries,
    )
    state = nemo.launch(request, load_config(a.config, a.overrides), dry_run=a.dry_run, follow=a.follow)
    print(f"experiment: {state}")
    return 0 if state in ("DRY RUN", "SUBMITTED", "SUCCEEDED") else 1


def check(arguments: argparse.Namespace) -> None:
    """asyppo check."""
    config = load_config(arguments.config, arguments.overrides)
    from asyppo_megatron.launch.allocation import check_allocation, shell_lines

    facts = check_allocation(config, arguments.nodes, arguments.gpus_per_node)
    print(shell_lines(facts) if arguments.shell else ", ".join(f"{name} {value}" for name, value in facts.items()))
