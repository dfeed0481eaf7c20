"""The files of a checkpoint: written by every rank, joined by the first, complete or not there, and checked.

    .iter_0000100.partial/      grows hidden; renamed when all of this is in it
        __RANK_0.distcp         what one rank wrote: Megatron-Core's `torch_dist` format
        common.pt metadata.json .metadata hf/
        endprompt.json          the manifest, with the size and the CRC-32 of every other file and its own
    iter_0000100.damaged/       found damaged when a run resumed; kept for a look, never chosen

Ranks tell the first what they wrote through small files beside theirs (`.rank_RANK.json`), not through
collectives: an asynchronous save runs beside the training, whose collectives it must not mix with.
"""

import json
import os
import shutil
import threading
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from endprompt_megatron.checkpoint import layout
from endprompt_megatron.checkpoint.shard_files import Shard, write_file
from endprompt_megatron.checkpoint.torch_dist import describe
from endprompt_megatron.common.direct_io import crc32
from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.files import checksums_of, write_json

DAMAGED = ".damaged"
_POLL_SECONDS = 0.02, 1.0  # between looks for the other ranks' files: at first, and at most


class Abandoned(Exception):
    """The save was given up while the first rank waited for the others."""


def begin(root: Path, iteration: int) -> Path:
    """A fresh hidden directory for `iteration` to grow in."""
    staging = root / f".{layout.iteration_dir(root, iteration).name}.partial"
    remove(staging)
    staging.mkdir(parents=True)
    return staging


def write_rank(staging: Path, rank: int, tensors: Iterable[Shard], objects: dict[str, object]) -> None:
    """Write this rank's data, and last of all what it consists of.  Memory: one tensor's, beyond what is given.

    Raises OSError if the disk refuses.
    """
    report = write_file(staging, f"__{rank}_0.distcp", tensors, objects)
    write_json(staging / f".rank_{rank}.json", report)


def join(staging: Path, ranks: int, common: dict, abandoned: threading.Event) -> dict[str, dict]:
    """On the first rank: wait for all ranks' data, then write what describes it; returns files with size and CRC.

    Raises Abandoned if the event is set while it waits.
    """
    reports = [_report(staging / f".rank_{rank}.json", abandoned) for rank in range(ranks)]
    describe(staging, reports, common)
    for rank in range(ranks):
        (staging / f".rank_{rank}.json").unlink()
    return checksums_of(staging, reports)


def _report(path: Path, abandoned: threading.Event) -> dict:
    pause, max_pause = _POLL_SECONDS
    while not path.exists():
        if abandoned.wait(pause):
            raise Abandoned
        pause = min(2 * pause, max_pause)
    return json.loads(path.read_text(encoding="utf-8"))


def publish(staging: Path, root: Path, iteration: int) -> Path:
    """Give a complete checkpoint its name.  One of the same name makes room: it is of the same step."""
    final = layout.iteration_dir(root, iteration)
    old = root / f".{final.name}.replaced"
    if final.exists():
        final.rename(old)
    _sync(staging)
    staging.rename(final)
    _sync(root)
    remove(old)
    layout.write_latest(root, iteration)
    return final


def _sync(directory: Path) -> None:
    """Make a directory's entries last; not every file system can."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def prune(root: Path, keep: int, every: int, spared: Collection[int] = ()) -> None:
    """Remove all complete iterations but the newest `keep` (0: all are kept), multiples of `every`, and `spared`."""
    for iteration in layout.complete_iterations(root)[:-keep] if keep else []:
        if not (every and iteration % every == 0) and iteration not in spared:
            remove(layout.iteration_dir(root, iteration))


def remove(directory: Path) -> None:
    """Remove a directory; stopped halfway, what is left of it is hidden."""
    if not directory.exists():
        return
    hidden = directory if directory.name.startswith(".") else directory.with_name(f".{directory.name}.removed")
    if hidden != directory:
        shutil.rmtree(hidden, ignore_errors=True)
        directory.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def clear_leftovers(root: Path) -> None:
    """Remove what a killed save or a killed removal left behind."""
    for leftover in root.glob(".iter_*"):
        shutil.rmtree(leftover, ignore_errors=True)


def damage(directory: Path, rank: int = 0, ranks: int = 1, *, only_sizes: bool = False) -> Iterator[str]:
    """What is wrong with a checkpoint, file by file, as far as this rank's share of its files tells.

    Reading every byte takes about as long as loading does, shared among the ranks in the same way; `only_sizes`
    reads none.
    """
    try:
        files = layout.read_manifest(directory)["files"]
    except InputError as error:
        yield str(error).removeprefix(f"{directory}/")
        return
    by_size = sorted(files, key=lambda name: (-files[name]["bytes"], name))
    for name in by_size[rank::ranks]:
        path, expected = directory / name, files[name]
        try:
            size = path.stat().st_size
            if size != expected["bytes"]:
                yield f"{name} has {size} bytes instead of {expected['bytes']}"
            elif not only_sizes and crc32(path) != expected["crc32"]:
                yield f"{name} does not have the CRC-32 it was written with"
        except FileNotFoundError:
            yield f"{name} is missing"
        except OSError as error:
            yield f"{name} cannot be read ({error.strerror})"


def set_aside(directory: Path) -> Path:
    """Rename a damaged checkpoint, so that nothing chooses it again.  Returns its new path."""
    for number in range(1, 1000):
        aside = directory.with_name(directory.name + DAMAGED + (f"-{number}" if number > 1 else ""))
        if not aside.exists():
            directory.rename(aside)
            return aside
    raise InputError(f"{directory}: a thousand damaged checkpoints of this step; remove them")
