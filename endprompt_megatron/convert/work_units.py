"""The files that a conversion writes: each by one worker, on one host or over many, and each only once.

A unit is a file, or a chunk of one from some byte on.  What is in which depends only on the model, so the result is
the same for any number of workers, and a conversion that was killed can continue with another number.  A unit is done
when its report (`.unit_NUMBER.json`: size and CRC-32) is there, written after its bytes are on the disk.
"""

import contextlib
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from endprompt_megatron.common.direct_io import crc32
from endprompt_megatron.common.files import resumable_directory, write_json
from endprompt_megatron.common.progress import Progress
from endprompt_megatron.common.workers import for_each, number_of, ranks_agree

MAX_WORKERS = 8  # of a host, unless told otherwise: more would wait for the disk


def write_units(
    out: Path,
    job: dict,
    sizes: list[int],
    start: Callable[[Path], Callable[[int], dict]],
    finish: Callable[[Path, list[dict]], None],
    workers: int | None,
    comm: Any | None,
) -> None:
    """Write `out` from units of `sizes` (bytes), then `finish` it; it appears when it is complete.

    `start`, importable by name, gets the directory to write in and returns what writes a unit and reports it.
    `job` tells one conversion from another.  With `comm`, of MPI, all ranks call.  Raises InputError.
    """
    workers = number_of(workers, comm, MAX_WORKERS)
    rank, ranks = (comm.rank, comm.size) if comm else (0, 1)
    staging = out.with_name(f".{out.name}.partial")
    with contextlib.ExitStack() as stack:
        with ranks_agree(comm):
            if rank == 0:
                stack.enter_context(resumable_directory(out, job))
        mine = list(range(rank, len(sizes), ranks))
        with ranks_agree(comm), Progress("converting", sum(sizes[n] for n in mine), shown=rank == 0) as progress:
            ready = functools.partial(_ready, start, staging, mine)
            done = for_each(ready, [sizes[number] for number in mine], workers, progress.add, fork=True)
        reports = dict(zip(mine, done, strict=True))
        if comm:
            reports = {number: report for theirs in comm.allgather(reports) for number, report in theirs.items()}
        with ranks_agree(comm):
            if rank == 0:
                finish(staging, [reports[number] for number in range(len(sizes))])


def _ready(start: Callable[[Path], Callable[[int], dict]], staging: Path, mine: list[int]) -> Callable[[int], dict]:
    write = start(staging)
    return lambda index: _once(staging, mine[index], write)


def _once(staging: Path, number: int, write: Callable[[int], dict]) -> dict:
    """The report of a unit: that of an earlier start, if the file still matches it, or of writing the file now."""
    record = staging / f".unit_{number:05d}.json"
    with contextlib.suppress(OSError, ValueError, KeyError):
        report = json.loads(record.read_text(encoding="utf-8"))
        path = staging / report["path"]
        size, begin, count = path.stat().st_size, report.get("begin", 0), report["bytes"]
        right = size >= begin + count if "begin" in report else size == count
        if right and crc32(path, begin, count) == report["crc32"]:
            return report
    report = write(number)
    write_json(record, report)
    return report


def identity(directory: Path) -> list:
    """What tells one state of a directory's files from another, for `job`: names, sizes, times of change."""
    found = []
    for path in sorted(directory.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            state = path.stat()
            found.append([path.name, state.st_size, state.st_mtime_ns])
    return found
