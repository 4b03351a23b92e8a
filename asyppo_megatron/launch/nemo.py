"""Runs as NeMo-Run experiments: the same recipes, on this machine under torchrun or on a Slurm cluster.

Needs the extra `nemo`. On Slurm each node gets one task, which is our own launcher, so that stops, stuck ranks and
failed starts are handled as in `slurm/*.sbatch`; NeMo-Run writes the batch script, submits it and puts failed jobs back
into the queue.
"""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asyppo_megatron.config import Config, ConfigError
from asyppo_megatron.launch.allocation import check_allocation

TITLE = "asyppo"
_SIGNAL = "USR1@300"  # to all processes of the steps, 5 minutes before the time limit: time to save


class NemoMissing(ValueError):
    """NeMo-Run is not installed."""


@dataclass(frozen=True)
class Request:
    """What is to be launched, and where.

    Attributes:
        config: path of the recipe.
        overrides: key=value.
        gpus_per_node: None: none are asked for.
        job_dir: where NeMo-Run keeps scripts and logs; none: its home.
        retries: how often a failed or stopped job is put back into the queue.
    """

    config: Path
    overrides: tuple[str, ...]
    executor: str
    nodes: int = 1
    gpus_per_node: int | None = None
    account: str = ""
    partition: str | None = None
    time: str = "24:00:00"
    container_image: str | None = None
    container_mounts: tuple[str, ...] = ()
    job_dir: Path | None = None
    retries: int = 100


def launch(request: Request, config: Config, *, dry_run: bool, follow: bool) -> str:
    """Check, then launch or only show what would be launched.

    Args:
        follow: wait for the end, showing the log; a local experiment always does.

    Returns:
        State of the experiment: "DRY RUN", "SUBMITTED", or NeMo-Run's at the end.

    Raises:
        NemoMissing: the extra is not installed.
        ConfigError: the run does not fit, or its files are not there.
    """
    facts = check_allocation(config, request.nodes, request.gpus_per_node)
    if facts["agent_nodes"] and request.nodes > 1:
        found = f"rollout.sglang: got engines for nodes {facts['agent_nodes']} of {request.nodes}"
        raise ConfigError(
            [
                f"{found}, need agents that run already, since NeMo-Run starts ranks only; set rollout.sglang.agents, "
                "or use sbatch slurm/*.sbatch"
            ]
        )
    run = _nemo()
    if request.job_dir is not None:
        # Not `base_dir`: the Slurm executor would look for the batch script in NeMo-Run's home all the same.
        run.config.set_nemorun_home(str(request.job_dir.absolute()))
    waits = follow or request.executor == "local"
    executor = _local(run, config) if request.executor == "local" else _slurm(run, request)
    task = _rank_task(run, request) if request.executor == "local" else _node_task(run, request)
    with run.Experiment(TITLE, skip_status_at_exit=True, enable_goodbye_message=False) as experiment:
        experiment.add(task, executor=executor, name="train", tail_logs=waits)
        if dry_run:
            experiment.dryrun()
            return "DRY RUN"
        experiment.run(detach=not waits, tail_logs=waits)
        if not waits:
            return "SUBMITTED"
    statuses = experiment.status(return_dict=True)  # leaving the experiment has waited for its end
    return ", ".join(sorted({str(s["status"]) for s in statuses.values()}))


def _nemo() -> Any:
    try:
        import nemo_run
    except ImportError as e:
        raise NemoMissing(
            f"asyppo launch: got no usable nemo_run ({e}), need the extra; pip install 'asyppo_megatron[nemo]'"
        ) from e
    return nemo_run


def _local(run: Any, config: Config) -> Any:
    # torchrun is found beside this interpreter, also where its environment is not activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "PATH": path}
    return run.LocalExecutor(launcher="torchrun", ntasks_per_node=config.num_ranks, env_vars=environment)


def _slurm(run: Any, request: Request) -> Any:
    return run.SlurmExecutor(
        account=request.account,
        partition=request.partition,
        nodes=request.nodes,
        ntasks_per_node=1,
        gpus_per_node=request.gpus_per_node,
        time=request.time,
        signal=_SIGNAL,
        retries=request.retries,
        container_image=request.container_image,
        container_mounts=list(request.container_mounts),
        # A launcher that fails says why to the others, and the first one counts the failure: they need a moment.
        srun_args=["--kill-on-bad-exit=0"],
        tunnel=run.LocalTunnel(job_dir=""),  # submitted from here; the nodes read the experiment where it was made
        packager=run.Packager(),  # nodes see this directory
    )


def _rank_task(run: Any, request: Request) -> Any:
    """What torchrun starts for every rank."""
    arguments = ["train", str(request.config.absolute()), *request.overrides]
    return run.Script(path="asyppo_megatron", m=True, entrypoint="python", args=arguments)


def _node_task(run: Any, request: Request) -> Any:
    """What srun starts on every node: the settings of all jobs, then a launcher."""
    words = [sys.executable, "-m", "asyppo_megatron", "train", str(request.config), *request.overrides]
    place = (
        '--nodes "$SLURM_NNODES" --node "$SLURM_NODEID" --job "$SLURM_JOB_ID" '
        '--rendezvous "$SLURM_LAUNCH_NODE_IPADDR:$ASYPPO_PORT"'
    )
    script = f"cd {shlex.quote(str(Path.cwd()))}\nsource slurm/env.sh\nexec {shlex.join(words)} {place}\n"
    return run.Script(inline=script, entrypoint="bash")
