"""Preflight in one rank of a pool, under a node name of its own, with the faults that a test asks for."""

import contextlib
import os
import time
from pathlib import Path
from unittest import mock

from endprompt_megatron.preflight import allreduce, node, rendezvous
from endprompt_megatron.preflight.checks import Options, run


def check(directory: str, per_node: int, faults: dict[int, list], timeout: float, overrides: list[str]) -> tuple:
    """Exit code and findings {check: (verdict, found)} of this rank; `faults` by rank: [what, value]."""
    rank = int(os.environ["RANK"])
    before, started = Path.cwd(), time.monotonic()
    place = {"SLURMD_NODENAME": f"n{rank // per_node + 1}", "LOCAL_RANK": str(rank % per_node)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, place))
        stack.callback(os.chdir, before)
        os.chdir(directory)
        if rank in faults:
            what, value = faults[rank]
            FAULTS[what](stack, value)
        outcome = run("recipe.yaml", overrides, Options(timeout=timeout))
    found = {finding.check: (finding.verdict, finding.found) for finding in outcome.findings}
    return outcome.code, found, time.monotonic() - started


def _directory(stack: contextlib.ExitStack, value: str) -> None:
    """A node that shares no file system with the others."""
    os.chdir(value)


def _clock(stack: contextlib.ExitStack, value: float) -> None:
    stack.enter_context(mock.patch.object(rendezvous, "_now", side_effect=lambda: time.time() + value))


def _version(stack: contextlib.ExitStack, value: dict) -> None:
    found, broken = node.versions()
    stack.enter_context(mock.patch.object(node, "versions", return_value=(found | value, broken)))


def _silent(stack: contextlib.ExitStack, value: float) -> None:
    """A rank that the others cannot reach in the all-reduce."""

    def lost(_launch, _seconds):
        time.sleep(value)
        raise RuntimeError("connection lost")

    stack.enter_context(mock.patch.object(allreduce, "_reduce", lost))


def _sum(stack: contextlib.ExitStack, value: float) -> None:
    """A rank whose memory or link changes one number."""
    import torch.distributed as dist

    real = dist.all_reduce

    def wrong(tensor):
        real(tensor)
        tensor[value] += 1

    stack.enter_context(mock.patch.object(dist, "all_reduce", wrong))


def _gpus(stack: contextlib.ExitStack, value: dict) -> None:
    stack.enter_context(mock.patch.object(node, "process_facts", return_value=value))


FAULTS = {
    "directory": _directory,
    "clock": _clock,
    "version": _version,
    "silent": _silent,
    "sum": _sum,
    "gpus": _gpus,
}
