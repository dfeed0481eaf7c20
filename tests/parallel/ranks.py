"""Several processes for a test: a pool that stays up, so that imports are paid once.

`Ranks.run(world, function, *args)` calls `function(*args)` in `world` processes that find each other as
torchrun's would, and returns each rank's result, or raises with the traceback of the rank that failed.
"""

import contextlib
import gc
import multiprocessing
import os
import random
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection
from typing import Any

from small import PATIENCE


class Ranks:
    def __init__(self, size: int, gpu: bool = False) -> None:
        self.size, self.gpu = size, gpu
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for _ in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, self.gpu), daemon=False)
            process.start()
            theirs.close()  # so that the end of a process is the end of its pipe
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, world: int, function: Callable, *args: Any, timeout: float = PATIENCE) -> list[Any]:
        """Each rank's result.  `timeout`, in seconds, is for ranks that wait for each other for ever."""
        port = _free_port()
        for rank, pipe in enumerate(self.pipes[:world]):
            pipe.send((rank, world, port, function, args))
        results, failures, deadline = {}, [], time.monotonic() + timeout
        waiting = {pipe: rank for rank, pipe in enumerate(self.pipes[:world])}
        while waiting:
            ready = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    error, results[rank] = pipe.recv()
                except EOFError:
                    error = "its process ended"
                if error:
                    failures.append(f"rank {rank}:\n{error}")
                    # The others may wait for it for ever.
                    deadline = min(deadline, time.monotonic() + 30)
            if not ready:
                self.close()
                self._start()
                failures.append(f"no answer from ranks {sorted(waiting.values())} of {world}, which were ended")
                break
        if failures:
            raise AssertionError("\n".join(failures))
        return [results[rank] for rank in range(world)]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _free_port() -> int:
    """A port below those that the system hands out by itself: in that range somebody may get it before rank 0 does."""
    while True:
        port = random.randrange(15000, 30000)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def _serve(pipe: Any, gpu: bool) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    if not gpu:  # several ranks on one machine are Gloo's, whether it has a GPU or not
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            rank, world, port, function, args = pipe.recv()
        except EOFError:
            return
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
        from endprompt_megatron.distributed import runtime

        try:
            answer = (None, function(*args))
        except BaseException:
            answer = (traceback.format_exc(), None)
        runtime.finish()
        # A model's reference cycles hold its process groups, and Gloo keeps two or three threads for each: left to
        # Python's collector, a process came to 2,000 threads whose polling took a third of both cores.
        gc.collect()
        pipe.send(answer)
