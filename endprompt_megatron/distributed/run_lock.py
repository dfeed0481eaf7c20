"""RUN/lock: one job at a time in a run directory.

The first rank holds it for all the others.  What tells whether a holder still lives, and why each is needed:

- An OS lock (flock).  The kernel frees it when its process ends in whatever way, so a killed job blocks
  nobody.  Local disks have it; NFS has it across nodes, but a dead node's lock stays for its lease
  (90 s with NFSv4); Lustre has it across nodes only when mounted with `flock`, within a node with
  `localflock`, and otherwise refuses it.
- So the file also says who holds it: host, process, Slurm job.  The same Slurm job, requeued, is the
  successor of a holder that is gone, since Slurm never runs a job twice at once.
- And a heartbeat, a number that the holder counts up in the file.  Whoever finds a holder of another node
  that the OS lock cannot speak for watches for a while whether it counts.  Nobody's clock is compared
  with anybody else's.
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
_WATCH_BEATS = 4  # without a count for so many, a holder is taken for dead
_GHOST_SECONDS = 120.0  # how long a dead node's OS lock can outlive it
_RECORD_BYTES = 512  # padded, so that each beat overwrites the one before
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK)


class RunLock:
    """Context manager on all ranks; the first one takes the lock, the others learn whether it could.

    Raises InputError on all of them, naming the holder, if another job uses the directory.
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
        """Take the lock, or raise InputError.  Returns at once unless a holder's life is in doubt."""
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
        """Give the lock back; does nothing on ranks that do not hold it."""
        if self._descriptor is None:
            return
        self._ended.set()
        self._beating.join()
        # Emptied and not removed: whoever opened the old file and whoever made a new one would both have a lock.
        os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)
        self._descriptor = None

    def _win(self) -> None:
        locked = self._lock()
        holder = self._holder()
        same_job = bool(self.job) and (holder or {}).get("job") == self.job
        if locked is False:
            # Only of this very job can the holder be a ghost; any other is what the lock is there for.
            if not same_job or not self._freed():
                raise self._refusal()
            locked = True
        elif holder and not same_job:
            here = holder.get("host") == self.host
            gone = locked if here else False  # within a node the OS lock tells all there is to know
            if here and locked is None:
                gone = not _alive(holder.get("pid"))
            if not gone and self._counts():
                raise self._refusal()
        self._count = 0
        self._write()
        if locked is None:
            # Without an OS lock two may have come this far: the one whose record stays has won.
            time.sleep(min(1.0, self.beat_seconds))
            if (self._holder() or {}).get("pid") != os.getpid() or self._holder().get("host") != self.host:
                raise self._refusal()

    def _lock(self) -> bool | None:
        """Whether the OS lock is ours now; None where the file system has none."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return None
            return False
        return True

    def _freed(self) -> bool:
        """Whether the OS lock becomes ours while its holder does not count."""
        before = self._holder()
        deadline = time.monotonic() + _GHOST_SECONDS
        while time.monotonic() < deadline:
            if self._lock():
                return True
            if self._holder() != before:
                return False
            time.sleep(self.beat_seconds / 5)
        return False

    def _counts(self) -> bool:
        """Whether the holder counts while it is watched."""
        before = self._holder()
        print(f"{self.path}: {_name(before)} did not give it back; watching for a sign of life", flush=True)
        deadline = time.monotonic() + _WATCH_BEATS * self.beat_seconds
        while time.monotonic() < deadline:
            time.sleep(self.beat_seconds / 5)
            if self._holder() != before:
                return True
        return False

    def _holder(self) -> dict | None:
        """Who holds it, as the file says; None if nobody, or if it cannot be made out."""
        with contextlib.suppress(OSError, ValueError):
            value = json.loads(self.path.read_text(encoding="utf-8"))  # opened anew: NFS then asks its server
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
            with contextlib.suppress(OSError):  # a full disk is the checkpoint's to say
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
