"""Lets Megatron-Core run on a machine without CUDA, over gloo. The only monkey patches of the product.

Megatron-Core names the CUDA device in many places. Here "cuda" means the CPU: constructor keywords, `.cuda()`,
streams and RNG states. Never installed where CUDA exists.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_mode: _CudaMeansCpu | None = None


def _is_cuda(device: object) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


class _CudaMeansCpu(TorchFunctionMode):
    """Redirects device arguments; thread-local, as every torch function mode is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron's optimizer compares these strings.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs = {**kwargs, "device": _CPU}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
            return func(*args, **kwargs)
        return func(*args)


class _NullStream:
    """A stream on a machine where everything is synchronous."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def install() -> None:
    global _mode
    if _mode is not None or torch.cuda.is_available():
        return
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: _NullStream()
    from megatron.core import jit

    jit.disable_jit_fuser()  # before other Megatron modules are imported
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    _mode = _CudaMeansCpu()
    _mode.__enter__()
