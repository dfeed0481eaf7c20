"""Real runs of several ranks, started often: each rank is a process of its own that can be killed.

A fork server imports the libraries once and forks each rank from there, so that a run starts in about a
second.  A rank calls train.train as tools/extend.py does; its exit code and what it prints are its own.
"""

import json
import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path

from small import PATIENCE, ROOT

_HERE = Path(__file__).resolve().parent.parent


class Job:
    """A run under way: its ranks, and what they print."""

    def __init__(self, processes, output):
        self.processes, self.output = processes, output

    def wait(self, timeout=PATIENCE):
        """Exit codes of the ranks, by rank."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                self.kill()
                raise TimeoutError(f"no end after {timeout} s:\n{self.said()}")
        return [process.exitcode for process in self.processes]

    def kill(self):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def said(self):
        return "".join(path.read_text() for path in sorted(self.output.parent.glob(f"{self.output.name}.*")))


class Jobs:
    def __init__(self, directory):
        self.directory, self.count = directory, 0
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["parallel.preloaded"])
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(map(str, filter(None, (_HERE, ROOT, before))))
        try:
            multiprocessing.forkserver.ensure_running()
        finally:
            os.environ.pop("PYTHONPATH")
            if before is not None:
                os.environ["PYTHONPATH"] = before

    def start(self, recipe, *overrides, ranks=2, trouble=None):
        """Start a run.  `trouble`: (kind, rank, step) of tests/parallel/preloaded.py."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.count += 1
        output = self.directory / f"job-{self.count}"
        processes = []
        for rank in range(ranks):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "CUDA_VISIBLE_DEVICES": "",
            }
            args = (environment, f"{output}.{rank}", str(recipe), list(map(str, overrides)), trouble)
            process = self.context.Process(target=_rank, args=args)
            process.start()
            processes.append(process)
        return Job(processes, output)

    def run(self, recipe, *overrides, ranks=2, codes=(0,), trouble=None):
        """Run to the end; every rank's exit code is among `codes`.  Returns what was printed."""
        job = self.start(recipe, *overrides, ranks=ranks, trouble=trouble)
        ended = job.wait()
        assert set(ended) <= set(codes), f"exit codes {ended}\n{job.said()}"
        return job.said()


def _rank(environment, output, recipe, overrides, trouble):
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    from parallel import preloaded

    preloaded.train(recipe, overrides, trouble)


def steps_of(run):
    """(step, loss, gradient norm) of every step that a run has logged, as far as the last line is whole."""
    path = run / "metrics.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            continue  # cut short by a kill
        if "loss" in value:
            found.append((value["step"], value["loss"], value["grad_norm"]))
    return found
