"""RUN/lock: one job at a time in a run directory.

Rank 0 holds it for all ranks.  Three things tell whether a holder still lives, and each is needed:

- An OS lock (flock).  The kernel releases it when its process ends for whatever reason, so a killed job blocks
  nobody.  Local disks support it.  NFS supports it across nodes, but the lock of a dead node stays for its lease
  (90 s with NFSv4).  Lustre supports it across nodes only when mounted with `flock`, within a node with
  `localflock`, and otherwise refuses it.
- The file therefore also names the holder: host, process, Slurm job.  The same Slurm job, requeued, is the
  successor of a holder that has ended, since Slurm never runs a job twice at once.
- And there is a heartbeat, a number in the file that the holder increments.  If the holder is on another node
  and the OS lock proves nothing, a new job watches for a while whether the number changes.  No clocks of
  different nodes are compared.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from datetime import datetime
from pathlib import Path

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.files import disk_errors

BEAT_SECONDS = 5.0
_WATCH_BEATS = 4  # a holder whose heartbeat does not change for this many beats counts as dead
_GHOST_SECONDS = 120.0  # how long the OS lock of a dead node can remain
_RECORD_BYTES = 512  # padded, so that each write replaces the one before
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK)


class RunLock:
    """Context manager on all ranks; rank 0 takes the lock.

    Raises InputError on all ranks, naming the holder, if another job uses the directory.
    """

    def __init__(self, run: Path, beat_seconds: float = BEAT_SECONDS) -> None:
        self.run, self.path, self.beat_seconds = run, run / "lock", beat_seconds
        self.job = os.environ.get("SLURM_JOB_ID")
        self.host = socket.gethostname()
        self._descriptor: int | None = None
        self._ended = threading.Event()
        self._beating: threading.Thread | None = None

    def __enter__(self) -> "RunLock":
        from endprompt_megatron.distributed import runtime

        with runtime.raise_on_all_ranks():
            if runtime.is_rank_zero():
                self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lock, or raise InputError.  Returns at once unless it is unclear whether a holder still lives."""
        with disk_errors(self.run, "checkpoint.dir"):
            self.run.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._win()
        except BaseException:
            os.close(self._descriptor)
            self._descriptor = None
            raise
        self._beating = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._beating.start()

    def release(self) -> None:
        """Release the lock; does nothing on ranks that do not hold it."""
        if self._descriptor is None:
            return
        self._ended.set()
        self._beating.join()
        # Emptied, not removed: otherwise one job could lock the old file while another locks a new one.
        os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)
        self._descriptor = None

    def _win(self) -> None:
        locked = self._lock()
        holder = self._holder()
        same_job = bool(self.job) and (holder or {}).get("job") == self.job
        if locked is False:
            # The OS lock can only be a leftover if it belongs to this same job; otherwise another job really holds it.
            if not same_job or not self._freed():
                raise self._refusal()
            locked = True
        elif holder and not same_job:
            here = holder.get("host") == self.host
            gone = locked if here else False  # within a node the OS lock is conclusive
            if here and locked is None:
                gone = not _alive(holder.get("pid"))
            if not gone and self._shows_life():
                raise self._refusal()
        self._count = 0
        self._write()
        if locked is None:
            # Without an OS lock two jobs may have come this far: the one whose record remains wins.
            time.sleep(min(1.0, self.beat_seconds))
            if (self._holder() or {}).get("pid") != os.getpid() or self._holder().get("host") != self.host:
                raise self._refusal()

    def _lock(self) -> bool | None:
        """Whether the OS lock is ours now; None if the file system does not support it."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return None
            return False
        return True

    def _freed(self) -> bool:
        """Whether the OS lock becomes ours while its holder's heartbeat does not change."""
        before = self._holder()
        deadline = time.monotonic() + _GHOST_SECONDS
        while time.monotonic() < deadline:
            if self._lock():
                return True
            if self._holder() != before:
                return False
            time.sleep(self.beat_seconds / 5)
        return False

    def _shows_life(self) -> bool:
        """Whether the holder's heartbeat changes while it is watched."""
        before = self._holder()
        print(f"{self.path}: {_name(before)} did not release it; watching whether it still runs", flush=True)
        deadline = time.monotonic() + _WATCH_BEATS * self.beat_seconds
        while time.monotonic() < deadline:
            time.sleep(self.beat_seconds / 5)
            if self._holder() != before:
                return True
        return False

    def _holder(self) -> dict | None:
        """The holder that the file names; None if there is none or the file cannot be read."""
        with contextlib.suppress(OSError, ValueError):
            value = json.loads(self.path.read_text(encoding="utf-8"))  # opened again: NFS then asks its server
            return value if isinstance(value, dict) else None
        return None

    def _write(self) -> None:
        record = {"host": self.host, "pid": os.getpid(), "job": self.job, "since": _SINCE, "count": self._count}
        line = json.dumps(record).ljust(_RECORD_BYTES - 1) + "\n"
        os.pwrite(self._descriptor, line.encode(), 0)
        os.fsync(self._descriptor)

    def _beat(self) -> None:
        while not self._ended.wait(self.beat_seconds):
            self._count += 1
            with contextlib.suppress(OSError):  # saving a checkpoint reports a full disk
                self._write()

    def _refusal(self) -> InputError:
        return InputError(
            f"{self.run}: in use by {_name(self._holder())} ({self.path}): wait for it, stop it, or choose another "
            "checkpoint.dir"
        )


_SINCE = datetime.now().astimezone().isoformat(timespec="seconds")


def _name(holder: dict | None) -> str:
    if not holder:
        return "another job"
    job = f", Slurm job {holder['job']}" if holder.get("job") else ""
    return f"process {holder.get('pid')} on {holder.get('host')}{job}, since {holder.get('since')}"


def _alive(pid: object) -> bool:
    if not isinstance(pid, int) or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
