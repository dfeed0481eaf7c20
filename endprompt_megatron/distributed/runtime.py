"""Processes, devices, seeds and signals: what differs between NCCL on GPUs and Gloo on CPUs.

`start` sets up a rank that torchrun, srun or mpirun launched; after it, everything is the same on both.  Only
this package asks which device a process runs on.
"""

import contextlib
import gc
import logging
import math
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from endprompt_megatron.common.errors import InputError, TrainingError, leave_at_once
from endprompt_megatron.distributed.hardware import here
from endprompt_megatron.distributed.numa import stay_beside_gpu
from endprompt_megatron.distributed.signals import StopSignal

_START_SECONDS = 600  # for all processes of a run to come together; ENDPROMPT_START_SECONDS is another
_GROUP_SECONDS = 1800.0  # that a collective may take where no watchdog looks first


def has_cuda() -> bool:
    """Whether this process trains on a GPU."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device of this rank."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else torch.device("cpu")


def backend() -> str:
    """The backend of this process's collectives: NCCL between GPUs, Gloo between CPUs."""
    return "nccl" if has_cuda() else "gloo"


def overlaps_communication() -> bool:
    """Whether communication can overlap computation: NCCL has streams for that, Gloo has none."""
    return has_cuda()


def synchronize() -> None:
    """Wait until this rank's device has finished its work; returns at once on a CPU."""
    if has_cuda():
        torch.cuda.synchronize()


def device_options(*, virtual_pipeline: bool) -> dict[str, bool]:
    """The arguments of Megatron's TransformerConfig that depend on the device."""
    cuda = has_cuda()
    return {
        "use_cpu_initialization": not cuda,
        # Between virtual stages sends and receives overlap computation; Gloo cannot batch them.
        "overlap_p2p_comm": cuda and virtual_pipeline,
        "batch_p2p_comm": cuda and not virtual_pipeline,
    }


@dataclass(frozen=True)
class Launch:
    """The place of this process among those that were started together."""

    rank: int
    world_size: int
    local_rank: int
    said_by: str = ""  # the variable that gave world_size


def launched_as() -> Launch:
    """Rank and world size from the environment of torchrun, srun or mpirun; otherwise a single process.

    Raises InputError if a variable is set but not a number.
    """
    families = (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
        ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
        # A step's own count: the shell of salloc's interactive step is one process, in a job of many tasks.
        ("SLURM_PROCID", _first_set("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), "SLURM_LOCALID"),
    )
    for names in families:
        # A batch script without srun has SLURM_PROCID=0 and SLURM_NTASKS=n: it is one process, not n.
        if names[0] == "SLURM_PROCID" and "SLURM_STEP_ID" not in os.environ:
            continue
        if names[0] in os.environ and names[1] in os.environ:
            try:
                return Launch(*(int(os.environ.get(name, "0")) for name in names), said_by=names[1])
            except ValueError:
                raise InputError(f"{names[0]}={os.environ[names[0]]} in the environment is not a number") from None
    return Launch(0, 1, 0)


def _first_set(*names: str) -> str:
    return next((name for name in names if name in os.environ), names[-1])


def take_device(launch: Launch) -> None:
    """Give this process its own GPU of its host.  A scheduler may show each task only its own GPU."""
    if has_cuda():
        own = launch.local_rank % torch.cuda.device_count()
        torch.cuda.set_device(own)
        if launch.world_size > 1:
            stay_beside_gpu(str(getattr(torch.cuda.get_device_properties(own), "uuid", "")))


def start(
    tensor: int,
    pipeline: int,
    virtual_pipeline: int | None,
    context: int,
    seed: int,
    *,
    timeout: float = _GROUP_SECONDS,
) -> Launch:
    """Set up the process group, Megatron's parallel state and the seeds of this rank.

    Gloo on CPUs, NCCL on GPUs.  `seed` is the same on every rank (weights come from a checkpoint; dropout is off).
    `timeout`: seconds that a collective of any group may take.
    """
    quiet_libraries()
    launch = launched_as()
    take_device(launch)
    if not has_cuda():
        from endprompt_megatron.distributed import cpu

        cpu.install()
    from megatron.core import parallel_state, tensor_parallel

    if not dist.is_initialized():
        _initialise_process_group(launch, timeout)
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual_pipeline if virtual_pipeline and virtual_pipeline > 1 else None,
        context_parallel_size=context,
        create_gloo_process_groups=True,
        distributed_timeout_minutes=math.ceil(timeout / 60),
    )
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return launch


def repeat_exactly() -> None:
    """Let torch take algorithms that give the same bits in every run, where it has the choice (train.deterministic)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it is written before it is read, and takes time


def _initialise_process_group(launch: Launch, timeout: float) -> None:
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        if launch.world_size > 1:
            raise InputError("MASTER_PORT is not set: start with torchrun, or export MASTER_ADDR and MASTER_PORT")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    seconds = float(os.environ.get("ENDPROMPT_START_SECONDS", _START_SECONDS))
    options = {"rank": launch.rank, "world_size": launch.world_size}
    try:
        store, *_ = next(dist.rendezvous("env://", **options, timeout=timedelta(seconds=seconds)))
        # No device_id: bound to a device, every group connects at once, and its sends and receives share one
        # communicator, in which the interleaved pipeline's and the context-parallel ring's wait for each other.
        dist.init_process_group(backend(), store=store, **options, timeout=timedelta(seconds=timeout))
    except dist.DistError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise TrainingError(
            f"rank {launch.rank}: {launch.said_by or 'WORLD_SIZE'}={launch.world_size} processes should meet at "
            f"{where}, but not all came within {seconds:g} s ({str(error).splitlines()[0][:120]}): start all of them "
            "(srun, torchrun), or one without that variable; ENDPROMPT_START_SECONDS says how long to wait"
        ) from None


@contextlib.contextmanager
def ended_together() -> Iterator[None]:
    """At the end the groups are destroyed; after an error this process ends at once, its line or traceback printed.

    The other ranks may be waiting in a collective that this one will never join: NCCL's groups cannot be destroyed
    then, and the traceback would never be seen.
    """
    try:
        yield
    except BaseException as error:
        if world_size() > 1:
            leave_at_once(error)
        finish()
        raise
    finish()


def finish() -> None:
    """Destroy the process groups, so that no rank hangs or warns at exit; let Python collect garbage again."""
    gc.enable()
    if dist.is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@contextlib.contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Raise an InputError of any rank inside on all ranks.  All ranks must enter and leave.

    Raised on one rank only, it would leave the others waiting in the next collective.
    """
    mine = None
    try:
        yield
    except InputError as error:
        mine = error
    messages: list = [None] * dist.get_world_size()
    dist.all_gather_object(messages, str(mine) if mine is not None else None)
    if mine is not None:
        raise mine
    for message in filter(None, messages):
        raise InputError(message)


def is_rank_zero() -> bool:
    """Whether this rank is the one that writes files and prints."""
    return not dist.is_initialized() or dist.get_rank() == 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def print_rank_zero(line: str) -> None:
    """Print, on rank 0 only."""
    if is_rank_zero():
        print(line, flush=True)


def peak_flops() -> float | None:
    """Dense BF16 peak of this rank's device in FLOP/s, the reference for MFU; None if unknown."""
    gpu = here().gpu if has_cuda() else None
    return gpu.bf16 or None if gpu else None


def quiet_libraries() -> None:
    """Silence third-party messages that appear on every rank and that no user can act on."""
    warnings.filterwarnings("ignore", module=r"megatron\..*")
    warnings.filterwarnings("ignore", module=r"torch\.distributed\..*")
    for name in ("megatron", "torch.distributed", "torch._dynamo", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)


def peak_memory_gib() -> float:
    """Peak memory of this rank in GiB: allocated on the GPU, resident on the CPU."""
    if has_cuda():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / (2**30 if sys.platform == "darwin" else 2**20)


def collect_garbage(step: int, interval: int) -> None:
    """Collect Python's garbage every `interval` steps, on all ranks in the same step; 0 leaves it to Python.

    Otherwise each rank pauses at a different moment, and the others wait for it.
    """
    if interval == 0:
        return
    if gc.isenabled():
        gc.disable()
    if step % interval == 0:
        gc.collect()


def agreed(stop: StopSignal) -> int:
    """The number of a signal that any rank received, the same on all ranks; 0 if none.  All ranks must call this."""
    number = torch.tensor([stop.received or 0], device=device())
    dist.all_reduce(number, op=dist.ReduceOp.MAX)
    return int(number)
