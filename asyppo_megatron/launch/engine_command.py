"""The command line and environment of one SGLang server, from the configuration of a run."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from asyppo_megatron.config import Config, SGLangConfig

_CPU_SEQUENCES = 16  # longest ones that the cache of a CPU engine holds when nothing else is said
_CPU_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class EngineCommand:
    """How one engine is started. gpus: of this node; empty on a CPU."""

    argv: tuple[str, ...]
    environment: dict[str, str]
    gpus: tuple[int, ...]


def engine_gpus(engines: SGLangConfig, index: int, num_gpus: int) -> tuple[int, ...]:
    """GPUs of the engine `index` of a node.

    Args:
        num_gpus: GPUs that this process sees; 0: a CPU machine.

    Raises:
        ValueError: the node has too few.
    """
    if not num_gpus:
        return ()
    need = engines.num_engines * engines.tp
    gpus = tuple(range(need)) if engines.gpus is None else engines.gpus
    if max(gpus) >= num_gpus:
        raise ValueError(
            f"rollout.sglang: got GPUs {list(gpus)} for {engines.num_engines} engine(s) of tp {engines.tp}, this node "
            f"has {num_gpus}; lower num_engines or tp, or set rollout.sglang.gpus"
        )
    return gpus[index * engines.tp : (index + 1) * engines.tp]


def engine_command(
    config: Config, index: int, port: int, num_gpus: int, environ: Mapping[str, str] = os.environ
) -> EngineCommand:
    """The command of the engine `index` of this node.

    Args:
        port: where it shall listen.
        num_gpus: GPUs that this process sees; 0: a CPU machine.
        environ: of this process; the engine inherits it but for what belongs to a rank.
    """
    engines, rollout = config.rollout.sglang, config.rollout
    gpus = engine_gpus(engines, index, num_gpus)
    length = engines.context_length or rollout.max_prompt_tokens + rollout.max_response_tokens
    tokenizer = config.data.tokenizer or config.actor.model
    options: dict[str, object] = {
        "model-path": config.actor.model.resolve(),
        "tokenizer-path": tokenizer.resolve(),
        "host": engines.host,
        "port": port,
        "tp-size": engines.tp,
        "dtype": engines.dtype or _CPU_DTYPES[config.actor.precision],
        "context-length": length,
        "mem-fraction-static": engines.mem_fraction,
        "max-running-requests": engines.max_concurrency,
        "random-seed": config.seed + index,
        "log-level": "info",
        "log-level-http": "warning",  # a line a request otherwise
    }
    total = engines.max_total_tokens
    flags = ["skip-server-warmup"]  # its request needs a tokenizer; the agent asks for itself whether it is ready
    backend = engines.attention_backend
    if not gpus:
        backend = backend or "torch_native"
        total = total or _CPU_SEQUENCES * length
        options |= {"device": "cpu", "sampling-backend": "pytorch", "grammar-backend": "none"}
        flags += ["disable-cuda-graph", "sleep-on-idle"]  # an idle engine would spin on a core that a rank needs
    elif engines.placement == "colocated":
        flags += ["enable-memory-saver", "sleep-on-idle"]
    if backend is not None:
        options["attention-backend"] = backend
    if total is not None:
        options["max-total-tokens"] = total
    argv = [sys.executable, "-m", "sglang.launch_server"]
    argv += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    argv += [f"--{name}" for name in flags] + list(engines.extra_args)
    return EngineCommand(tuple(argv), _environment(engines, index, gpus, environ), gpus)


def _environment(
    engines: SGLangConfig, index: int, gpus: tuple[int, ...], environ: Mapping[str, str]
) -> dict[str, str]:
    """What the engine's processes see: not the ranks' world, and only the GPUs that are theirs."""
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in environ.items() if k not in ranks and not k.startswith("TORCHELASTIC_")}
    kept |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    if gpus:
        # This process may itself see a part of the node: its device numbers index into that.
        visible = [name for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        kept["CUDA_VISIBLE_DEVICES"] = ",".join(visible[gpu] if visible else str(gpu) for gpu in gpus)
        # Weights reach the engine as CUDA IPC handles, which expandable segments can only pass with pidfd_getfd.
        kept.pop("PYTORCH_CUDA_ALLOC_CONF", None)
        return kept
    kept |= {"SGLANG_USE_CPU_ENGINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    if engines.tp > 1:  # SGLang wants one set of cores a rank, or as many NUMA nodes as ranks
        cores = sorted(os.sched_getaffinity(0))
        first = index * engines.tp
        kept["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(
            str(cores[(first + rank) % len(cores)]) for rank in range(engines.tp)
        )
        # A CUDA build of torch brings NCCL, which SGLang would take for ranks that have no GPU.
        kept["SGLANG_NCCL_SO_PATH"] = "none"
    return kept


def missing_for_engines(num_gpus: int) -> str:
    """What this environment lacks to start an engine and what to do; "" when nothing is missing."""
    if importlib.util.find_spec("sglang") is None:
        return (
            "rollout.engine sglang: SGLang is not installed in this environment; "
            'install it with `pip install "asyppo_megatron[sglang]"` (Python >= 3.12), give rollout.sglang.urls or '
            ".agents of servers elsewhere, or set rollout.engine=embedded"
        )
    if not num_gpus and importlib.util.find_spec("sgl_kernel") is None:
        return (
            "rollout.engine sglang: without a GPU SGLang needs the CPU build of sgl_kernel, which is not on the "
            "package index: build it from SGLang's source, put the tests' stand-in on PYTHONPATH "
            "(tests/engines/stand_in; slow, for trying out), or set rollout.engine=embedded"
        )
    return ""
