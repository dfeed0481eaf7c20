"""Runs the stages that a study's trials lack on this machine, several at once, by the tools that a user would call.

One process polls its children and starts no thread.  It passes signals on to them (training then writes a checkpoint),
and if it is killed they are asked to stop as well.  Children inherit the descriptor of a trial's lock file, so a study
that is started again waits for those that the last runner left.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from endprompt_megatron.common.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INPUT,
    EXIT_RESUMABLE,
    InputError,
)
from endprompt_megatron.common.file_lock import lock_file
from endprompt_megatron.common.files import disk_errors
from endprompt_megatron.distributed.signals import StopSignal
from endprompt_megatron.study.grid import Study, Trial
from endprompt_megatron.study.sweeps import not_chosen, phases
from endprompt_megatron.study.trial import DEVELOP, TRAIN, Work

TOOLS = Path(__file__).resolve().parents[2] / "tools"
WAIT_SECONDS = 120.0  # for a trial that another process has locked: a training that was asked to stop needs some of it
_POLL_SECONDS = 0.05


def works_of(study: Study, trials: list[Trial], again: bool, last: str) -> list[Work]:
    """The trials' states.  With `again`, trials that were run with other settings are emptied; otherwise InputError."""
    works = [Work(study, trial, last) for trial in trials]
    for work in works:
        try:
            work.refuse_changed()
        except InputError:
            if not again:
                raise
            work.forget()
    return works


def run(study: Study, trials: list[Trial], *, again: bool = False) -> int:
    """Run what `trials` lack; returns the exit code.  Killed and called again, it resumes.

    A trial that fails does not stop the others; wrong input does.  Raises InputError.
    """
    _check([Work(study, trial) for trial in trials], again)
    with StopSignal().listening() as stop, disk_errors(study.out, "out"):
        for last, those in phases(study, trials):
            code = _run_phase(study, works_of(study, those, again, last), stop)
            if code != EXIT_DONE:
                return code
        for trial in not_chosen(study):
            Work(study, trial, DEVELOP).clean()
    return EXIT_DONE


def _run_phase(study: Study, works: list[Work], stop: StopSignal) -> int:
    """Run what the works lack; returns the exit code."""
    for work in works:
        if work.last != DEVELOP:
            work.clean()  # a kill may have come between the last record and this
    waiting = [work for work in works if work.left]
    if len(waiting) < len(works):
        print(f"{len(works) - len(waiting)} of {len(works)} trials are already done", flush=True)
    return _Runner(waiting, study.parallel, stop).run()


def _check(works: list[Work], again: bool) -> None:
    """Refuse at once what extend.py would refuse after hours of other trials.  Raises InputError."""
    from endprompt_megatron.config.constraints.check import check

    for work in works:
        if work.trial.trained and (again or TRAIN in work.left):
            check(work.trial.recipe, f"{work.study.path}: trial {work.trial.name}", world_size=work.study.processes)


@dataclass
class _Job:
    """A stage's process."""

    work: Work
    stage: str
    process: subprocess.Popen
    lock: IO
    began: float

    @property
    def name(self) -> str:
        return f"{self.work.trial.name} {self.stage}"


class _Runner:
    def __init__(self, waiting: list[Work], parallel: int, stop: StopSignal) -> None:
        self.waiting, self.parallel, self.stop = waiting, parallel, stop
        self.active: list[_Job] = []
        self.failed: list[str] = []
        self.wrong: str | None = None
        self.alone_since = time.monotonic()  # since when nothing has run, though something is left
        self.resumable = self.asked = False

    def run(self) -> int:
        try:
            while self.active or (self.waiting and not self._ending):
                self._begin()
                if self._ending and not self.asked:
                    self._ask_to_stop()
                for job in list(self.active):
                    ended = _ended(job.process)
                    if ended is not None:
                        self.active.remove(job)
                        self._finished(job, *ended)
                time.sleep(_POLL_SECONDS)
        finally:
            self._ask_to_stop()
        if self.wrong is not None:
            raise InputError(self.wrong)
        if self.failed:
            print(f"failed: {', '.join(self.failed)}; the same command runs them again", file=sys.stderr, flush=True)
            return EXIT_FAILED
        if self.resumable:
            print("stopped early; the same command resumes", file=sys.stderr, flush=True)
            return EXIT_RESUMABLE
        return EXIT_DONE

    def _begin(self) -> None:
        """Start trials while slots are free; it is wrong input if another process holds the rest for too long."""
        for work in list(self.waiting):
            if len(self.active) >= self.parallel or self._ending:
                return
            lock = _lock(work)
            if lock is not None:
                self.waiting.remove(work)
                self._next_stage(work, lock)
        if self.active or not self.waiting:
            self.alone_since = time.monotonic()
        elif time.monotonic() - self.alone_since > WAIT_SECONDS:
            busy = self.waiting[0]
            self.wrong = (
                f"{busy.study.path}: trial {busy.trial.name}: another process has locked it; "
                "wait for that process, or stop it"
            )

    @property
    def _ending(self) -> bool:
        if self.stop.received:
            self.resumable = True
        return bool(self.resumable or self.wrong)

    def _ask_to_stop(self) -> None:
        self.asked = True
        for job in self.active:
            with contextlib.suppress(ProcessLookupError):
                job.process.send_signal(signal.SIGTERM)

    def _next_stage(self, work: Work, lock: IO) -> None:
        """Start the next stage of a trial whose lock we hold; a stage that needs no process is done at once."""
        work.__post_init__()  # another process may have had the lock
        while work.left:
            stage = work.left[0]
            if not work.path.exists():
                work.begin()
            work.prepare(stage)
            command = work.command(stage)
            if command is not None:
                self.active.append(_start(work, stage, command, lock))
                return
            work.finish(stage, *work.spent(stage, 0.0, 0.0))
        lock.close()
        print(f"{work.trial.name}: done", flush=True)

    def _finished(self, job: _Job, code: int, cpu_seconds: float) -> None:
        seconds = time.monotonic() - job.began
        spent = job.work.spent(job.stage, seconds, cpu_seconds)
        if code == EXIT_DONE:
            job.work.finish(job.stage, *spent)
            print(f"{job.name}: {seconds:.0f} s", flush=True)
            if self._ending and job.work.left:
                job.lock.close()
            else:
                self._next_stage(job.work, job.lock)
            return
        job.lock.close()
        log = job.work.directory / f"{job.stage}.log"
        if code == EXIT_INPUT:
            self.wrong = self.wrong or f"trial {job.name}: {_last_line(log).removeprefix('error: ')} (see {log})"
        elif code == EXIT_RESUMABLE or self._ending:  # only a training handles the signal; it ends the other tools
            self.resumable = True
            print(f"{job.name}: stopped", flush=True)
        else:
            self.failed.append(job.work.trial.name)
            print(f"{job.name}: exit code {code}; {_last_line(log)} (see {log})", file=sys.stderr, flush=True)


def _start(work: Work, stage: str, command: list[str], lock: IO) -> _Job:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    parent = os.getpid()
    with open(work.directory / f"{stage}.log", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, str(TOOLS / command[0]), *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=[lock.fileno()],
            start_new_session=True,  # so that Ctrl-C reaches this process alone, which passes it on
            preexec_fn=lambda: _stop_with(parent),  # safe: this process has no threads of its own
        )
    return _Job(work, stage, process, lock, time.monotonic())


def _stop_with(parent: int) -> None:
    """Ask this process to stop when its parent is killed: prctl(PR_SET_PDEATHSIG, SIGTERM)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getppid() != parent:  # it was killed before the call, so no signal will come
        os._exit(EXIT_FAILED)


def _ended(process: subprocess.Popen) -> tuple[int, float] | None:
    """Exit code of a child that has ended, as Popen gives it, and the CPU seconds of it and its own children."""
    pid, status, usage = os.wait4(process.pid, os.WNOHANG)
    if pid == 0:
        return None
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_utime + usage.ru_stime


def _lock(work: Work) -> IO | None:
    """The trial's lock, held until it and every child's copy are closed; None while another process holds it."""
    work.directory.mkdir(parents=True, exist_ok=True)
    file = open(work.directory / "lock", "w")  # noqa: SIM115  (closed when the trial is done)
    if lock_file(file):
        return file
    file.close()
    return None


def _last_line(log: Path) -> str:
    """The line of a stage's log that says what went wrong."""
    lines = [line for line in _lines(log) if line.strip()]
    said = [line for line in lines if line.startswith(("error:", "watchdog:"))]
    return (said or lines or ["the log is empty"])[-1].strip()


def _lines(log: Path) -> Iterator[str]:
    with open(log, encoding="utf-8", errors="replace") as file:
        yield from file
