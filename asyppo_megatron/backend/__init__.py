"""What differs between machines: device, communication library, layer spec. Nothing else in the product asks."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist


def has_gpu() -> bool:
    return torch.cuda.is_available()


def local_device(local_rank: int) -> torch.device:
    return torch.device("cuda", local_rank % torch.cuda.device_count()) if has_gpu() else torch.device("cpu")


def has_transformer_engine() -> bool:
    """Whether Transformer Engine can serve the layers: installed, importable and with a GPU to run on."""
    if not has_gpu():
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, RuntimeError, OSError):  # its meta package raises RuntimeError without the torch part
        return False
    return True


def init_distributed(rank: int, world_size: int, local_rank: int, timeout_s: float) -> tuple[torch.device, dist.Store]:
    """Join the world named by MASTER_ADDR and MASTER_PORT. Groups are made by `parallel/process_groups`.

    `device_id` is deliberately not bound: with it every later `new_group` would split the world's communicator,
    which is a collective of all ranks.

    Returns:
        this rank's device, and a key-value store of the run, apart from the one that torch uses.
    """
    device = local_device(local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)  # several ranks share the cores; two threads each were measured 10-40 times slower
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")  # a gloo world is a full mesh of connections otherwise
    # What torch keeps of the last collectives, so that a rank which is stuck can say in which; NCCL has it by default.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    timeout = timedelta(seconds=timeout_s)
    store, rank, world_size = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))
    store.set_timeout(timeout)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("torch", store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    return device, dist.PrefixStore("asyppo", store)


def prepare_megatron() -> None:
    """Make Megatron-Core ready in this process: the CPU shim where there is no GPU, its buffer and its RNG tracker.

    Safe to call again.
    """
    if not has_gpu():
        from . import cpu_shim

        cpu_shim.install()
    from megatron.core import parallel_state, tensor_parallel

    from . import adamw_state

    adamw_state.install()
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:  # the one global of Megatron that it cannot do without
        parallel_state._set_global_memory_buffer()
    # No dropout anywhere, so the tracker needs no states; the inference tracker accepts that.
    tensor_parallel.random.initialize_rng_tracker(inference_rng_tracker=True)


def empty_cache(device: torch.device) -> None:
    """Give memory that torch keeps for later back to the device, where other processes need it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_memory_gb(device: torch.device) -> float:
    """Highest resident (CPU) or allocated (GPU) memory of this process so far, GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
