"""Everything that lets Megatron-Core run without CUDA, and nothing else.

Megatron-Core requests CUDA by name in many places: it creates tensors with `device="cuda"`, copies with
`.cuda()`, reads and sets the CUDA random state, and compares type names such as torch.cuda.FloatTensor.
`install` redirects each of these to the CPU.  runtime.py calls it once, and only on machines without CUDA.
Importing this module changes nothing.
"""

import functools
import warnings
from typing import Any

import torch
import torch.utils._device

_FACTORIES = (
    "tensor as_tensor zeros ones empty full arange rand randn randint zeros_like ones_like empty_like full_like"
)
_installed = False


def install() -> None:
    """Redirect Megatron-Core's use of CUDA to the CPU.  Raises RuntimeError if CUDA is available."""
    global _installed
    if torch.cuda.is_available():
        raise RuntimeError("cpu.install() on a machine with CUDA would send training to the CPU")
    if _installed:
        return
    _installed = True
    _redirect_torch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each missing optional GPU package prints a warning
        _redirect_megatron()


def _on_cpu(device: Any) -> Any:
    """The CPU if a CUDA device was requested, otherwise the same device."""
    if isinstance(device, int) or (device is not None and str(device).startswith("cuda")):
        return torch.device("cpu")
    return device


def _redirect_torch() -> None:
    # `with torch.device("meta")`, which transformers uses to load models, identifies the factories by identity and
    # caches them at its first use.  Trigger that before they are wrapped.
    torch.utils._device._device_constructors()
    for name in _FACTORIES.split():
        setattr(torch, name, _without_cuda(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
    torch.Tensor.to = _without_cuda(torch.Tensor.to)
    torch.Tensor.new_empty = _without_cuda(torch.Tensor.new_empty)

    type_of = torch.Tensor.type

    def cuda_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The name that the type has on a GPU: the distributed optimizer accepts no other."""
        found = type_of(self, *args, **kwargs)
        return found.replace("torch.", "torch.cuda.", 1) if isinstance(found, str) and self.is_cpu else found

    torch.Tensor.type = cuda_type

    cuda = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.device_count = lambda: 1
    for name in "set_device synchronize empty_cache manual_seed manual_seed_all reset_peak_memory_stats".split():
        setattr(cuda, name, lambda *args, **kwargs: None)
    cuda.current_stream = lambda *args, **kwargs: None  # requested but, without CUDA graphs, not used
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
        module.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    for name in ("range_push", "range_pop", "mark"):
        setattr(cuda.nvtx, name, lambda *args, **kwargs: None)


def _without_cuda(function: Any) -> Any:
    """`function` with the CPU instead of a CUDA device among its arguments, and without pinned memory."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        kwargs.pop("pin_memory", None)
        if len(args) > 1 and isinstance(args[1], (str, torch.device)):  # tensor.to("cuda")
            args = (args[0], _on_cpu(args[1]), *args[2:])
        return function(*args, **kwargs)

    return call


def _redirect_megatron() -> None:
    from megatron.core.distributed import param_and_grad_buffer as buffers
    from megatron.core.optimizer import clip_grads
    from megatron.core.tensor_parallel import random

    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    buffers.dist_reduce_scatter_func = _unless_alone(buffers.dist_reduce_scatter_func)
    buffers.dist_all_gather_func = _unless_alone(buffers.dist_all_gather_func)
    clip_grads.multi_tensor_scale_impl = _scale_in_place


def _unless_alone(collective: Any) -> Any:
    """`collective` of DDP's buffers, skipped if the group has one rank.

    Its input and output are then the same memory: NCCL does nothing, but Gloo copies the complete model twice.
    """

    @functools.wraps(collective)
    def call(output: torch.Tensor, source: torch.Tensor, **kwargs: Any) -> Any:
        if kwargs["group"].size() == 1 and output.data_ptr() == source.data_ptr():
            return None
        return collective(output, source, **kwargs)

    return call


def _scale_in_place(_chunk_size: int, _overflow: Any, tensors: list, scale: float) -> None:
    """Megatron's local_multi_tensor_scale, which clips gradients, without a copy of each of them."""
    sources, targets = tensors
    if sources is targets:
        torch._foreach_mul_(sources, scale)
        return
    for source, target in zip(sources, targets, strict=True):
        torch.mul(source, scale, out=target)
