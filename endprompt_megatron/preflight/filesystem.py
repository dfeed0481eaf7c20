"""The run's directory: no other job uses it, every node can write to it and sees what the others write.

The first rank of each node writes and fsyncs a file of its own under RUN and then looks for the others'.
Nothing is left behind: neither the files nor a directory that was created for them.
"""

import contextlib
import os
import sys
import time
from pathlib import Path

from endprompt_megatron.preflight.rendezvous import Meeting
from endprompt_megatron.preflight.table import FAIL, NOT_RUN, OK, WARN, Finding, join_names

WRITING, SHARED, HELD = "run directory", "shared file system", "run lock"
_SLOW = 5.0  # seconds of one small write with fsync
_PATIENCE = 5.0  # seconds that a network file system may take to show what another node wrote


def share(meeting: Meeting, run_dir: Path, patience: float = _PATIENCE) -> list[Finding]:
    """Write, look, clean up.  The leader of each node calls; rank 0 gets the findings, the others an empty list."""
    place = run_dir.absolute() / f".preflight-{meeting.key}"
    made: list[Path] = []
    try:
        meeting.post("wrote", _write(place, meeting, made))
        if meeting.rank == 0:
            meeting.tell("look", meeting.gather("wrote", meeting.leaders.values()))
        wrote = {int(rank): answer for rank, answer in meeting.hear("look", 2 * meeting.seconds).items()}
        written = [rank for rank, answer in wrote.items() if "error" not in answer]
        meeting.post("unseen", _unseen(place, meeting.key, written, patience) if meeting.rank in written else None)
        unseen = {}
        if meeting.rank == 0:
            unseen = meeting.gather("unseen", wrote, meeting.seconds + patience)
            meeting.tell("looked", None)
        meeting.hear("looked", 2 * meeting.seconds + patience)
    finally:
        for remove in (_file(place, meeting.rank).unlink, place.rmdir):
            with contextlib.suppress(OSError):  # only the last node to clean up finds the directory empty
                remove()
    meeting.post("cleared", None)
    if meeting.rank == 0:
        meeting.gather("cleared", wrote)
        meeting.tell("all cleared", None)
    meeting.hear("all cleared", 2 * meeting.seconds)
    for directory in reversed(made):
        with contextlib.suppress(OSError):
            directory.rmdir()
    return [_writing(meeting, run_dir, wrote), _sharing(meeting, wrote, unseen)] if meeting.rank == 0 else []


def lock(run_dir: Path) -> Finding:
    """Whether a job that starts now could use RUN: the lock is taken and released if another job has held it.

    Raises InputError, naming the holder.  It may take some seconds to see whether the holder still lives.
    """
    from endprompt_megatron.distributed.run_lock import RunLock

    if not (run_dir / "lock").exists():
        return Finding(HELD, "no other job uses it")
    taken = RunLock(run_dir)
    with contextlib.redirect_stdout(sys.stderr):  # messages while it waits are not part of the table
        taken.acquire()
    taken.release()
    return Finding(HELD, "no other job uses it; the last one has ended")


def _file(place: Path, rank: int) -> Path:
    return place / f"{rank}"


def _write(place: Path, meeting: Meeting, made: list[Path]) -> dict:
    """Write this node's file; directories that had to be created are added to `made`, outermost first."""
    started = time.perf_counter()
    try:
        for directory in [*reversed(place.parents), place]:
            with contextlib.suppress(FileExistsError):
                if not directory.is_dir():
                    directory.mkdir()
                    made.append(directory)
        with open(_file(place, meeting.rank), "w", encoding="utf-8") as file:
            file.write(meeting.key)
            file.flush()
            os.fsync(file.fileno())
        descriptor = os.open(place, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        return {"error": (error.strerror or type(error).__name__).lower()}
    return {"seconds": time.perf_counter() - started}


def _unseen(place: Path, key: str, ranks: list[int], patience: float) -> list[int]:
    """The ranks whose file does not show its content here after `patience` seconds."""
    deadline = time.monotonic() + patience
    missing = ranks
    while True:
        missing = [rank for rank in missing if not _reads(_file(place, rank), key)]
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.1)


def _reads(path: Path, key: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == key
    except (OSError, UnicodeDecodeError):
        return False


def _writing(meeting: Meeting, run_dir: Path, wrote: dict[int, dict]) -> Finding:
    broken = {meeting.nodes[rank]: answer["error"] for rank, answer in wrote.items() if "error" in answer}
    silent = [node for node, rank in meeting.leaders.items() if rank not in wrote]
    if broken or silent:
        problems = [
            f"{error} on {join_names(n for n in broken if broken[n] == error)}"
            for error in dict.fromkeys(broken.values())
        ]
        problems += [f"no answer from {join_names(silent)}"] if silent else []
        return Finding(WRITING, f"checkpoint.dir: {run_dir} cannot be written: {'; '.join(problems)}", FAIL)
    slowest = max(answer["seconds"] for answer in wrote.values())
    found = f"{run_dir}: written and synced in {slowest * 1e3:.0f} ms"
    if len(wrote) > 1:
        found += f" at most, on {len(wrote)} nodes"
    return Finding(WRITING, found + ("; slow" if slowest > _SLOW else ""), WARN if slowest > _SLOW else OK)


def _sharing(meeting: Meeting, wrote: dict[int, dict], unseen: dict[int, list[int] | None]) -> Finding:
    if len(meeting.leaders) == 1:
        return Finding(SHARED, "one node: nothing to compare with", NOT_RUN)
    written = [rank for rank, answer in wrote.items() if "error" not in answer]
    if len(written) < 2:
        return Finding(SHARED, "fewer than two nodes could write, see above", NOT_RUN)
    problems = []
    for reader, missing in unseen.items():
        if missing:
            others = len(missing) == len(written) - 1 and len(written) > 2
            writers = "any other node" if others else join_names(meeting.nodes[rank] for rank in missing)
            problems.append(f"{meeting.nodes[reader]} does not see what {writers} wrote")
    problems += [f"no answer from {meeting.nodes[rank]}" for rank in written if rank not in unseen]
    if problems:
        return Finding(SHARED, f"checkpoint.dir is not the same directory on all nodes: {join_names(problems)}", FAIL)
    return Finding(SHARED, f"{len(written)} nodes see each other's files", OK)
