"""What is reported about slow ranks, and when a watchdog ends a process."""

import subprocess
import sys

import pytest
from small import PATIENCE, ROOT

from endprompt_megatron.distributed.watchdog import Watchdog, _ranges, group_seconds, place_of, slowest

NAMES = [f"node{rank // 2}, local rank {rank % 2}" for rank in range(4)]


def test_the_slowest_rank_is_named_with_its_ratio_to_the_median_and_the_cause():
    times = [[0.1, 1.0, 0.002], [0.1, 1.0, 0.002], [0.1, 1.1, 0.003], [0.9, 1.0, 0.002]]
    values, line = slowest(times, NAMES, 200)
    found = values["stragglers"]
    assert (found["rank"], found["host"], found["probe_rank"]) == (3, "node1, local rank 1", 2)
    assert found["ratio"] == pytest.approx(1.9 / 1.1)
    assert found["probe_ratio"] == pytest.approx(1.5)
    assert (found["data_s"], found["compute_s"]) == (0.9, 1.0)
    assert line.startswith("step 200  slowest rank 3 (node1, local rank 1): 1.900 s of its own time, 1.73 x the median")
    assert "slowest device rank 2 (node1, local rank 0): 1.50 x" in line


def test_watchdog_limit_is_the_factor_times_the_median_and_at_least_the_floor(tmp_path):
    watchdog = Watchdog(tmp_path, 0, NAMES, factor=10.0, floor=60.0)
    assert watchdog._limit(between=False) == 60
    watchdog.seconds.extend([9.0, 10.0, 11.0])
    assert watchdog._limit(between=False) == 100
    assert watchdog._limit(between=True) == 1800
    watchdog.seconds.extend([400.0] * 9)
    assert watchdog._limit(between=True) == 1800, "ten medians come after the groups' own timeout"
    watchdog.seconds.extend([900.0] * 20)
    assert watchdog._limit(between=True) == 2700, "three medians, for steps as slow as that"


@pytest.mark.parametrize("floor", [0.5, 60.0, 300.0])
def test_groups_wait_longer_than_the_watchdog_and_than_its_last_resort(tmp_path, floor):
    watchdog = Watchdog(tmp_path, 0, NAMES, factor=10.0, floor=floor)
    watchdog.seconds.append(floor * 9)
    assert group_seconds(floor) >= 1.5 * watchdog._limit(between=True) + 6 * watchdog.settle + 60


def test_place_of_a_frame_is_the_line_of_this_package_and_the_innermost_function(tmp_path):
    assert place_of(None) == "no Python code"
    assert place_of(sys._getframe()) == sys._getframe().f_code.co_name
    frames = []

    class Recording:
        def __sub__(self, _):
            frames.append(sys._getframe())
            return 0

        __rsub__ = __sub__

    watchdog = Watchdog(tmp_path, 0, NAMES, factor=0.0, floor=60.0)
    watchdog.now = (Recording(), "step 1", 60.0)
    watchdog.step_ends()
    assert place_of(frames[0]).startswith("distributed/watchdog.py:")
    assert place_of(frames[0]).endswith(" step_ends (__sub__)")


def test_ranks_are_printed_as_ranges():
    assert _ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"


HANGING = """
import sys, time
from pathlib import Path
from endprompt_megatron.distributed.watchdog import Watchdog

watchdog = Watchdog(Path(sys.argv[1]), 0, ["here, local rank 0"], factor=10.0, floor=0.5)
watchdog.start()
for step in range(1, 6):
    watchdog.step_begins(step)  # ends at once: on a busy machine a pause could last half a second
    watchdog.step_ends()
watchdog.step_begins(6)
if sys.argv[2] == "sleep":
    time.sleep(3600)
elif sys.argv[2] == "hold":
    import ctypes  # PyDLL keeps Python's lock while it calls: no other Python thread runs
    ctypes.PyDLL(None).sleep(3600)
watchdog.end()
print("ended well")
"""


def run(tmp_path, how):
    return subprocess.run(
        [sys.executable, "-c", HANGING, str(tmp_path), how], capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT
    )


def test_watchdog_ends_a_hung_process_with_1_and_writes_its_stacks(tmp_path):
    done = run(tmp_path, "sleep")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("watchdog: step 6 has taken ")
    assert "rank 0 in <module>" in line
    stacks = (tmp_path / "rank_0.txt").read_text()
    assert stacks.startswith("== rank 0 (here, local rank 0), ")
    assert 'File "<string>", line 13 in <module>' in stacks


def test_watchdog_ends_a_process_that_never_releases_pythons_lock(tmp_path):
    done = run(tmp_path, "hold")
    assert done.returncode == 1
    assert 'File "<string>", line 16 in <module>' in (tmp_path / "rank_0.txt").read_text()


def test_watchdog_of_a_process_that_ends_normally_leaves_no_file(tmp_path):
    done = run(tmp_path, "not")
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended well\n", "")
    assert not list(tmp_path.iterdir())
