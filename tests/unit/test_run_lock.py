"""One job at a time in a run directory; a killed job blocks nobody, least of all its own restart."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from small import ROOT

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.distributed import run_lock
from endprompt_megatron.distributed.run_lock import RunLock

BEAT = 0.05
HOLDER = """
import sys, time
from pathlib import Path
from endprompt_megatron.distributed.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]), beat_seconds=0.05)
lock.acquire()
print("held", flush=True)
time.sleep(float(sys.argv[2]))
lock.release()
"""


def hold(run, seconds=3600.0, **environment):
    """Another process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run), str(seconds)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def other(tmp_path):
    process = hold(tmp_path / "run", SLURM_JOB_ID="41")
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def take(run, beat=BEAT):
    lock = RunLock(run, beat_seconds=beat)
    lock.acquire()
    return lock


def elsewhere(run, **record):
    """A record that a process of another node left, whose OS lock this node does not see."""
    run.mkdir(exist_ok=True)
    written = {"host": "far", "pid": 7, "job": "41", "since": "then", "count": 0, **record}
    (run / "lock").write_text(json.dumps(written))


def test_the_refusal_names_the_holder_and_leaves_its_record_unchanged(tmp_path, other, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    with pytest.raises(InputError, match=rf"in use by process {other.pid} on \S+, Slurm job 41, since .*lock\): wait"):
        take(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "lock").read_text())["pid"] == other.pid


def test_the_same_job_started_twice_is_refused_once_the_holder_shows_life(tmp_path, other, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    begun = time.monotonic()
    with pytest.raises(InputError, match="in use by"):
        take(tmp_path / "run")
    assert time.monotonic() - begun < 100, "it waited for the ghost of a dead node to give the lock back"


@pytest.mark.parametrize("job", ["41", "42", None], ids=["same-job", "another-job", "no-job"])
def test_a_killed_holder_of_this_node_blocks_nobody(tmp_path, other, monkeypatch, job):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if job:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    other.send_signal(signal.SIGKILL)
    other.wait()
    begun = time.monotonic()
    take(tmp_path / "run").release()
    assert time.monotonic() - begun < 100, "it waited for the ghost of a dead node to give the lock back"


def test_a_released_lock_leaves_an_empty_file(tmp_path):
    first = take(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "lock").read_text())["pid"] == os.getpid()
    first.release()
    assert (tmp_path / "run" / "lock").read_bytes() == b""
    take(tmp_path / "run").release()


def test_the_same_job_requeued_on_another_node_gets_the_lock_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    elsewhere(tmp_path / "run")
    take(tmp_path / "run").release()
    assert capsys.readouterr().out == ""


def test_a_holder_on_another_node_without_a_heartbeat_counts_as_dead(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    elsewhere(tmp_path / "run")
    take(tmp_path / "run").release()
    assert "process 7 on far, Slurm job 41, since then did not release it" in capsys.readouterr().out


def test_a_holder_on_another_node_with_a_heartbeat_keeps_the_lock(tmp_path, monkeypatch):
    """Its OS lock is not visible here, as with Lustre's localflock, but its heartbeat in the file is."""
    import threading

    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    elsewhere(tmp_path / "run")
    counting = threading.Timer(BEAT, elsewhere, (tmp_path / "run",), {"count": 1})
    counting.start()
    with pytest.raises(InputError, match="in use by process 7 on far"):
        take(tmp_path / "run", beat=2.0)  # watched for four beats, and refused as soon as it counts
    counting.join()


def test_without_os_locks_a_living_holder_keeps_the_lock_and_a_dead_one_does_not(tmp_path, other, monkeypatch):
    def refuse(*_):
        raise OSError(run_lock.errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(run_lock.fcntl, "flock", refuse)
    with pytest.raises(InputError, match=f"in use by process {other.pid}"):
        take(tmp_path / "run")
    other.kill()
    other.wait()
    take(tmp_path / "run").release()
