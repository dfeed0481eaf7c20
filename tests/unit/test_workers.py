"""Tasks over processes: all results in order, or one error; never a process that stays."""

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
from small import ROOT

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.workers import for_each, number_of


def start(what: str):
    """Made in every process."""
    if what == "unready":
        raise InputError("not ready")
    return functools.partial(task, what)


def task(what: str, number: int):
    if what == "killed" and number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "wrong" and number == 3:
        raise InputError("task 3 is wrong")
    time.sleep(0.02)
    return number, os.getpid()


@pytest.mark.parametrize("fork", [False, True])
@pytest.mark.parametrize("workers", [1, 2, 9])
def test_results_of_workers_are_in_order_whichever_ended_first(workers, fork):
    done = []
    results = for_each(functools.partial(start, "well"), [5, 1, 9, 9, 2, 3, 4, 8], workers, done.append, fork=fork)
    assert [number for number, _ in results] == list(range(8))
    assert sorted(done) == [1, 2, 3, 4, 5, 8, 9, 9]
    processes = {pid for _, pid in results}
    assert processes == {os.getpid()} if workers == 1 else os.getpid() not in processes


@pytest.mark.parametrize(
    ("what", "needle"), [("killed", "a worker was killed"), ("wrong", "task 3 is wrong"), ("unready", "not ready")]
)
@pytest.mark.parametrize("fork", [False, True])
def test_a_failing_task_ends_all_workers(what, needle, fork):
    before = set(multiprocessing.active_children())
    with pytest.raises(InputError, match=needle):
        for_each(functools.partial(start, what), [1] * 40, 2, lambda _: None, fork=fork)
    assert set(multiprocessing.active_children()) == before


FORK = """
import sys
sys.path.insert(0, {root!r})
import torch
from endprompt_megatron.common.workers import for_each

torch.set_num_threads(4)
values = torch.arange(1 << 20, dtype=torch.float64)
expected = (values * 2).sum()
print(for_each(lambda: lambda n: bool((values * 2).sum() == expected), [1] * 4, 2, lambda _: None, fork=True))
"""


def test_a_fork_computes_though_its_parent_has_computed_with_threads():
    """The pool of OpenMP's threads does not survive a fork, and who waits for it waits for ever."""
    done = subprocess.run([sys.executable, "-c", FORK.format(root=str(ROOT))], capture_output=True, text=True)
    assert done.stdout.strip() == str([True] * 4), done.stderr


ORPHANS = """
import functools, os, signal, sys, time
sys.path.insert(0, {root!r})
from endprompt_megatron.common import workers


def late(*arguments):
    # The parent is killed while this process starts, before it could ask to be killed with it.
    print("started", os.getpid(), flush=True)
    while os.getppid() == arguments[1]:
        time.sleep(0.01)
    starting(*arguments)


def nothing():
    return lambda number: number


starting, workers._start = workers._start, late
if __name__ == "__main__":
    workers.for_each(nothing, [1] * 4, 2, lambda _: None, fork=True)
"""


def test_a_worker_whose_parent_was_killed_while_it_started_does_not_stay():
    process = subprocess.Popen(
        [sys.executable, "-c", ORPHANS.format(root=str(ROOT))], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline().startswith("started")
    process.kill()
    process.communicate()  # for ever, if a worker stayed: it holds the other end


def test_impossible_numbers_of_workers_are_refused():
    assert number_of(3, None) == 3
    assert number_of(None, None) >= 1
    with pytest.raises(InputError, match="--workers 0: should be at least 1"):
        number_of(0, None)
    with pytest.raises(InputError, match="every rank is one worker"):
        number_of(2, object())
    assert number_of(None, object()) == 1
