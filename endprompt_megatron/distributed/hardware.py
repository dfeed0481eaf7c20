"""The hardware that a recipe runs on, as far as rules and estimates depend on it.  Imports torch only when needed.

`here()` is this machine; `of_kind("h100")` is a machine that a plan is made for.  The numbers in GPUS come from
NVIDIA's data sheets: dense peaks without sparsity, link rates in one direction.
"""

import functools
import importlib.metadata
import importlib.util
from dataclasses import dataclass

from endprompt_megatron.common.errors import InputError


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU: memory in GiB as the driver shows it, FLOP/s dense, bytes/s."""

    name: str
    capability: tuple[int, int]
    memory_gib: float
    bf16: float
    fp8: float | None  # None if it has no FP8
    bandwidth: float  # of its own memory
    nvlink: float  # to the other GPUs of its node, one direction
    network: float  # to other nodes, one direction, per GPU

    @property
    def hopper(self) -> bool:
        return self.capability[0] == 9

    @property
    def blackwell(self) -> bool:
        return self.capability[0] >= 10


GPUS = {
    "a100": Gpu("A100", (8, 0), 79.3, 312e12, None, 2.0e12, 300e9, 25e9),
    "h100": Gpu("H100", (9, 0), 79.6, 989e12, 1979e12, 3.35e12, 450e9, 50e9),
    "h200": Gpu("H200", (9, 0), 140.0, 989e12, 1979e12, 4.8e12, 450e9, 50e9),
    "b200": Gpu("B200", (10, 0), 178.0, 2250e12, 4500e12, 8.0e12, 900e9, 50e9),
}


@dataclass(frozen=True)
class Hardware:
    """What a recipe runs on.  `gpu` is None on CPUs; `te` is Transformer Engine's version, or None."""

    gpu: Gpu | None
    te: tuple[int, ...] | None


def of_kind(kind: str, option: str = "--gpu") -> Hardware:
    """A node of that kind of GPU with Transformer Engine.  Raises InputError for an unknown kind."""
    if kind.lower() not in GPUS:
        raise InputError(f"{option} {kind}: unknown GPU; use one of {', '.join(GPUS)}")
    return Hardware(GPUS[kind.lower()], (2, 9))


@functools.cache
def here() -> Hardware:
    """This machine.  Looks for a GPU only if Transformer Engine is installed or torch is already imported."""
    import sys

    te = te_version()
    if te is None and "torch" not in sys.modules:
        return Hardware(None, None)
    import torch

    if not torch.cuda.is_available():
        return Hardware(None, te)
    return Hardware(_this_gpu(torch.cuda.get_device_properties(0)), te)


def _this_gpu(properties: object) -> Gpu:
    """The entry of the table for this GPU; an unknown GPU gets its own memory and no peaks."""
    name, memory = properties.name, properties.total_memory / 2**30
    for gpu in sorted(GPUS.values(), key=lambda gpu: -gpu.memory_gib):
        if gpu.name in name:
            return gpu
    return Gpu(name, (properties.major, properties.minor), memory, 0.0, None, 0.0, 0.0, 0.0)


def has_transformer_engine() -> bool:
    """Whether Transformer Engine can be imported (it is not imported here)."""
    return importlib.util.find_spec("transformer_engine") is not None


@dataclass(frozen=True)
class VisibleGpu:
    """A GPU that this process sees: the driver's name for it and its memory in GiB."""

    uuid: str
    name: str
    memory_gib: float


def visible_gpus() -> list[VisibleGpu]:
    """The GPUs that this process sees, in CUDA's order; none on a CPU."""
    import torch

    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return [
        VisibleGpu(str(getattr(p, "uuid", number)), p.name, p.total_memory / 2**30)
        for number, p in enumerate(properties)
    ]


def free_memory_gib(number: int) -> float:
    """Free memory of the visible GPU with this number."""
    import torch

    return torch.cuda.mem_get_info(number)[0] / 2**30


def cuda_libraries() -> dict[str, str]:
    """Versions of cuDNN (91900 for 9.19.0) and NCCL as they are loaded; empty if there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        return {}
    return {"cuDNN": _cudnn_version(), "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}


def _cudnn_version() -> str:
    import torch

    try:
        return str(torch.backends.cudnn.version())
    except RuntimeError:  # older than the one torch was built with: Transformer Engine found the system's
        major, minor, patch = torch._C._cudnn.getRuntimeVersion()
        return str(10000 * major + 100 * minor + patch)


def te_version() -> tuple[int, ...] | None:
    """Transformer Engine's version as numbers, (2, 13, 0); None if it is not installed."""
    if not has_transformer_engine():
        return None
    for name in ("transformer-engine", "transformer-engine-cu13", "transformer-engine-cu12"):
        try:
            text = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return tuple(int(part) for part in text.split("+")[0].split(".") if part.isdigit())
    return (0,)
