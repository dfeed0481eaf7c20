"""One list of tasks over the processes of a host, or over the ranks that mpirun or srun started."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

from endprompt_megatron.common.errors import EXIT_INPUT, InputError


def cpus() -> int:
    """What Slurm or a container leaves to this process, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def mpi() -> Any | None:
    """The MPI communicator if this process is one of several that mpirun or srun started, otherwise None.

    Raises InputError if it is, but MPI cannot be used.
    """
    sizes = {
        name: int(os.environ.get(name, 1)) for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
    }
    name, size = max(sizes.items(), key=lambda item: item[1])
    if size == 1:
        return None
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is there, the MPI library is not
        raise InputError(f"{name}={size}: running under MPI needs mpi4py and an MPI library ({error})") from None
    if MPI.COMM_WORLD.size != size:
        raise InputError(f"{name}={size}, but MPI sees {MPI.COMM_WORLD.size} process; use mpirun or srun --mpi=pmix")
    return MPI.COMM_WORLD


def number_of(workers: int | None, comm: Any | None, max_workers: int | None = None) -> int:
    """The processes to use on this host: `workers`, or one a CPU but no more than `max_workers`; 1 under MPI.

    Raises InputError for a number that cannot be.
    """
    if comm is not None:
        if workers is not None and workers > 1:
            raise InputError(f"--workers {workers}: under mpirun every rank is one worker; give -n to mpirun instead")
        return 1
    if workers is not None and workers < 1:
        raise InputError(f"--workers {workers}: should be at least 1")
    return workers or min(cpus(), max_workers or cpus())


def for_each(
    start: Callable[[], Callable[[int], Any]],
    sizes: list[int],
    workers: int,
    done: Callable[[int], None],
    *,
    fork: bool = False,
) -> list[Any]:
    """Results of task 0, 1, ... of `sizes` (bytes), by `workers` processes; `done` is called with each size.

    `start` makes a process ready and returns what does a task; both must be importable by name.  What a task
    raises ends the others and is raised here; InputError if a process was killed.  `fork` starts them with the
    libraries that this process has loaded.
    """
    workers = min(workers, len(sizes))
    if workers <= 1:
        task, results = start(), []
        for number, size in enumerate(sizes):
            results.append(task(number))
            done(size)
        return results

    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from concurrent.futures.process import BrokenProcessPool

    # On macOS the system's own libraries do not bear a fork.
    context = multiprocessing.get_context("fork" if fork and sys.platform == "linux" else "spawn")
    results: list[Any] = [None] * len(sizes)
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(start, os.getpid())) as pool:
        futures = {}
        try:
            # The largest first: it must not start last.
            order = sorted(range(len(sizes)), key=lambda number: -sizes[number])
            for number in order:
                futures[pool.submit(_task_of, number)] = number
            for future in as_completed(futures):
                results[futures[future]] = future.result()
                done(sizes[futures[future]])
        except BaseException as error:
            # No process should keep writing what nobody wants.  And a pool that broke while it was starting would wait
            # for ever for the processes that it started last.
            for process in set(multiprocessing.active_children()) - others:
                process.kill()
            if isinstance(error, BrokenProcessPool):
                message = f"--workers {workers}: a worker was killed, most likely for memory; use fewer"
                raise InputError(message) from None
            raise
    return results


_task: Callable[[int], Any] | None = None
_failure: Exception | None = None


def _start(start: Callable[[], Callable[[int], Any]], parent: int) -> None:
    global _task, _failure  # the one thing a pool's process keeps between tasks
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    if "torch" in sys.modules:  # forked: the threads that the parent may have had are not there to be waited for
        sys.modules["torch"].set_num_threads(1)
    _end_with(parent)
    try:
        _task = start()
    except Exception as error:  # raised by the first task: an initializer's error would only break the pool
        _failure = error


def _task_of(number: int) -> Any:
    if _failure is not None:
        raise _failure
    return _task(number)


def _end_with(parent: int) -> None:
    """If the parent is killed, nobody waits for what this process does: prctl(PR_SET_PDEATHSIG, SIGKILL)."""
    with contextlib.suppress(OSError, AttributeError):
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:  # killed before that: its signal will not come
        os._exit(1)


@contextlib.contextmanager
def ranks_agree(comm: Any | None) -> Iterator[None]:
    """What one rank raises in the block ends it on all: raised on the first rank, the others leave quietly."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if comm is None:
        if failure is not None:
            raise failure
        return
    failures = [error for error in comm.allgather(failure) if error is not None]
    if failures and comm.rank == 0:
        raise failures[0]
    if failures:
        sys.exit(EXIT_INPUT)
