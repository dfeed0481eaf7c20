"""Ranks started on one machine: exit codes and signals pass through, and no rank is left waiting."""

import os
import signal
import subprocess
import sys
import time

import pytest
from small import PATIENCE, ROOT

from endprompt_megatron.distributed.runtime import launched_as

# Rank r leaves with the r-th code, or waits for a lost rank if it is "wait".
RANK = """
import os, sys, time
code = sys.argv[1:][int(os.environ["RANK"])]
time.sleep(3600) if code == "wait" else sys.exit(int(code))
"""
LISTENER = """
import os, signal, sys, time
def stop(number, frame):
    open(sys.argv[1] + os.environ["RANK"] + ".signal", "w").write(str(number))
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
    signal.signal(number, stop)
open(sys.argv[1] + os.environ["RANK"] + ".ready", "w").close()
time.sleep(3600)
"""
SPAWN = (
    "import sys; from endprompt_megatron.distributed.launch import spawn; "
    "sys.exit(spawn(sys.argv[2:], int(sys.argv[1])))"
)


def launch(script, *arguments, processes):
    """`spawn` in a process of its own: it sets signal handlers."""
    command = [sys.executable, "-c", SPAWN, str(processes), str(script), *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([0, 0], 0),
        ([0, 75], 75),
        ([75, 75], 75),
        ([1, 75], 1),
        ([0, 1], 1),
        ([2, 1], 2),
        ([75, 2], 2),
        ([3, 0], 3),
    ],
)
def test_spawn_returns_the_most_serious_exit_code(tmp_path, codes, expected):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    assert launch(script, *codes, processes=2).wait(PATIENCE) == expected


@pytest.mark.parametrize("code", [1, 2])
def test_a_failed_rank_ends_the_ranks_that_wait_for_it(tmp_path, code):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    assert launch(script, "wait", code, processes=2).wait(PATIENCE) == code


def test_a_rank_killed_by_a_signal_makes_spawn_fail(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert launch(script, processes=2).wait(PATIENCE) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_spawn_forwards_a_signal_to_every_rank(tmp_path, number):
    script = tmp_path / "rank.py"
    script.write_text(LISTENER)
    process = launch(script, f"{tmp_path}/", processes=2)
    while len(list(tmp_path.glob("*.ready"))) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(PATIENCE) == 75
    assert [int((tmp_path / f"{rank}.signal").read_text()) for rank in range(2)] == [number] * 2


def test_spawn_sets_the_environment_variables_of_torchrun(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(
        "import os\n"
        "found = ' '.join(os.environ[n] for n in 'RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT'.split())\n"
        "os.write(1, f'{found}\\n'.encode())  # at once: print may write word by word, and three ranks share a pipe\n"
    )
    out, _ = launch(script, processes=3).communicate(timeout=PATIENCE)
    ranks = sorted(line.split() for line in out.splitlines())
    assert [rank[:4] for rank in ranks] == [[str(r), str(r), "3", "127.0.0.1"] for r in range(3)]
    assert len({rank[4] for rank in ranks}) == 1


SLURM = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"}
INTERACTIVE = SLURM | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "4294967290"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, (2, 4, 1)),
        # A batch script, whose variables are the job's: it is one process.
        (SLURM | {"SLURM_PROCID": "0"}, (0, 1, 0)),
        # A step of srun, by itself and with fewer tasks than its job.
        (SLURM | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8"}, (3, 8, 1)),
        (SLURM | {"SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "4"}, (3, 4, 1)),
        (SLURM | {"SLURM_STEP_ID": "0"}, (3, 8, 1)),
        # salloc's interactive step, and `srun --pty` inside of an allocation.
        (INTERACTIVE | {"SLURM_STEP_NUM_TASKS": "1"}, (0, 1, 0)),
        (INTERACTIVE | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "2"}, (0, 1, 0)),
        # torchrun inside of a step decides.
        (SLURM | {"SLURM_STEP_ID": "0", "RANK": "5", "WORLD_SIZE": "16", "LOCAL_RANK": "5"}, (5, 16, 5)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, (1, 2, 1)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, (1, 2, 0)),
    ],
)
def test_place_of_a_process_is_that_of_its_launcher(monkeypatch, environment, place):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "PMI_", "OMPI_", "MPI_")) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    launch = launched_as()
    assert (launch.rank, launch.world_size, launch.local_rank) == place
