"""The last steps of preparing data: the chunks' files become one dataset, and its files get their names.

Files are joined in the order of the input, and each token is on the disk only once: a file is removed when its tokens
are in the dataset and synced, and a record (`.joined.json`) says up to which chunk that is so, with the bytes and
CRC-32 that each gave.  A run that was killed while joining goes on from there.  What is stored beside the tokens, the
mask of conversations, is joined in the same way.

Several files cannot be renamed at once.  A note (`.finishing.json`) in the staging directory says that all files are
there and were being renamed: a start that finds it renames what is left.
"""

import contextlib
import errno
import json
import os
import shutil
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from endprompt_megatron.common.direct_io import combined_crc32
from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.files import read_json, refuse_existing, write_json, write_text
from endprompt_megatron.data.corpus.filters import first_of_each
from endprompt_megatron.data.corpus.tokenise import TRAIN, Job, Tokenised
from endprompt_megatron.data.indexed import MASK, path_of, write_idx

SUFFIXES = (".bin", ".json", ".idx")  # the index comes last: a dataset without it is refused as incomplete
CHAT_SUFFIXES = (f"{MASK}.bin", f"{MASK}.idx", *SUFFIXES)
_NOTE = ".finishing.json"
_LAST = (_NOTE, ".job.json", ".lock")
_RECORD_BYTES = 256 << 20
_BLOCK = 16 << 20
_CANNOT_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class Joined:
    """A dataset in the staging directory: `lengths` of its documents in tokens (int32).

    `bounds` are the first document of each chunk, and the end; `duplicates` counts the copies that were left out;
    `checksums` are CRC-32 by the suffix of a file (".bin"); `answers`, of conversations, the tokens that are answers.
    """

    lengths: np.ndarray
    bounds: np.ndarray
    duplicates: int
    max_id: int
    checksums: dict[str, int]
    answers: int | None = None


def joined_path(staging: Path, output: str, suffix: str) -> Path:
    """A file of the dataset before it gets its name."""
    return staging / f"joined{output}{suffix}"


def join(job: Job, tokenised: list[Tokenised], output: str) -> Joined:
    """Write joined.bin and joined.idx of one output from the chunks' files, and those of the mask."""
    numbers = range(len(tokenised))
    lengths = [np.fromfile(job.chunk_file(number, output, ".lengths"), dtype=np.int32) for number in numbers]
    counts = [len(chunk) for chunk in lengths]
    bounds = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    kept = None
    if job.filters.dedup:
        kept = first_of_each([job.chunk_file(number, output, ".digests") for number in numbers])
    kept_of_chunks = None if kept is None else np.split(kept, bounds[1:-1])
    checksums = {
        stream: _join_stream(job, tokenised, output, stream, dtype, lengths, kept_of_chunks)
        for stream, dtype in job.streams.items()
    }
    everything = np.concatenate(lengths)
    if kept is not None:
        everything = everything[kept]
        bounds = np.concatenate([[0], np.cumsum(kept, dtype=np.int64)])[bounds]
    for stream, dtype in job.streams.items():
        write_idx(joined_path(job.staging, output, stream.replace(".bin", ".idx")), everything, dtype)
    highest = max((each.max_ids[output] for each in tokenised), default=0)
    mask = joined_path(job.staging, output, f"{MASK}.bin")
    answers = _ones(mask) if job.reading.chat else None
    return Joined(everything, bounds, sum(counts) - len(everything), highest, checksums, answers)


def _ones(mask: Path) -> int:
    total = 0
    with open(mask, "rb") as file:
        while block := file.read(_BLOCK):
            total += block.count(1)
    return total


def already_joined(job: Job, output: str, stream: str) -> list[list[int]]:
    """[bytes, CRC-32] of each chunk that an earlier start put into the dataset, up to the first that is damaged."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        recorded = json.loads(_record(job, output, stream).read_text(encoding="utf-8"))
        found = []
        with open(joined_path(job.staging, output, stream), "rb") as file:
            for count, checksum in recorded:
                left, crc32 = count, 0
                while left and (block := file.read(min(left, _BLOCK))):
                    left, crc32 = left - len(block), zlib.crc32(block, crc32)
                if left or crc32 != checksum:
                    break
                found.append([count, checksum])
        return found
    return []


def _record(job: Job, output: str, stream: str) -> Path:
    return job.staging / f".joined{output}{stream.removesuffix('.bin')}.json"


def _join_stream(
    job: Job,
    tokenised: list[Tokenised],
    output: str,
    stream: str,
    dtype: np.dtype,
    lengths: list[np.ndarray],
    kept: list[np.ndarray] | None,
) -> int:
    """Write the stream of all chunks into one file; returns its CRC-32."""
    target = joined_path(job.staging, output, stream)
    done = already_joined(job, output, stream)
    waiting = [job.chunk_file(number, output, stream) for number in range(len(done))]
    target.touch()
    with open(target, "r+b", buffering=1 << 20) as joined:
        joined.truncate(joined.seek(sum(count for count, _ in done)))
        unsaved = 0
        for number in range(len(done), len(tokenised)):
            path = job.chunk_file(number, output, stream)
            with open(path, "rb") as source:
                if kept is None or kept[number].all():
                    [file] = [file for file in tokenised[number].files if file["file"] == path.name]
                    _copy(source, joined, file["bytes"])
                    done.append([file["bytes"], file["crc32"]])
                else:
                    done.append(_copy_some(source, joined, lengths[number], kept[number], dtype))
            waiting.append(path)
            unsaved += done[-1][0]
            if unsaved >= _RECORD_BYTES or number == len(tokenised) - 1:
                joined.flush()
                os.fsync(joined.fileno())
                write_text(_record(job, output, stream), json.dumps(done))
                for path in waiting:
                    path.unlink(missing_ok=True)
                waiting, unsaved = [], 0
    return combined_crc32(done)


def _copy(source: BinaryIO, target: BinaryIO, count: int) -> None:
    """Copy all `count` bytes of a file, inside the kernel where it offers that."""
    target.flush()
    at, done = target.tell(), 0
    with contextlib.suppress(AttributeError):  # not every system offers it
        while done < count:
            try:
                copied = os.copy_file_range(source.fileno(), target.fileno(), count - done, done, at + done)
            except OSError as error:
                if error.errno in _CANNOT_COPY:
                    break
                raise
            if not copied:
                break
            done += copied
    source.seek(done)
    target.seek(at + done)
    shutil.copyfileobj(source, target, _BLOCK)


def _copy_some(source: BinaryIO, target: BinaryIO, lengths: np.ndarray, kept: np.ndarray, dtype: np.dtype) -> list[int]:
    """Copy the tokens of the documents that are kept; returns [bytes, CRC-32]."""
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]) * dtype.itemsize
    edges = np.flatnonzero(np.diff(np.concatenate([[0], kept.astype(np.int8), [0]])))
    total = checksum = 0
    for begin, end in offsets[edges].reshape(-1, 2).tolist():
        source.seek(begin)
        while begin < end and (block := source.read(min(end - begin, _BLOCK))):
            target.write(block)
            begin += len(block)
            total += len(block)
            checksum = zlib.crc32(block, checksum)
    return [total, checksum]


def refuse_taken(out: str, outputs: Iterable[str], suffixes: tuple[str, ...] = SUFFIXES) -> None:
    """Raise InputError if `out` is no prefix, or its files exist and are not those of a run that was renaming them."""
    path = Path(out)
    if path.is_dir() or out.endswith("/"):
        raise InputError(f"--out {out}: is a directory; give a prefix such as {path / 'corpus'}")
    if not (path.with_name(f".{path.name}.partial") / _NOTE).exists():
        for output in outputs:
            for suffix in suffixes:
                refuse_existing(path_of(out, output + suffix), "--out")


def finish_renaming(
    staging: Path, out: str, outputs: Iterable[str], suffixes: tuple[str, ...] = SUFFIXES
) -> dict | None:
    """Finish the renaming of an earlier start; returns its manifest, or None if there was none to finish.

    Raises InputError if a file is in the way.
    """
    note = staging / _NOTE
    if note.exists():
        pairs = _pairs(staging, out, outputs, suffixes)
        if all(source.exists() or target.exists() for source, target in pairs):
            manifest = read_json(note, "the manifest of a finished dataset")
            _rename(staging, pairs)
            return manifest
        note.unlink()
    refuse_taken(out, outputs, suffixes)
    return None


def publish(staging: Path, out: str, manifests: dict[str, dict], suffixes: tuple[str, ...] = SUFFIXES) -> None:
    """Write the manifests, give the datasets their names, and remove the staging directory."""
    for output, manifest in manifests.items():
        write_json(joined_path(staging, output, ".json"), manifest)
        for suffix in suffixes:
            if suffix.endswith(".idx"):
                with open(joined_path(staging, output, suffix), "rb+") as file:
                    os.fsync(file.fileno())
    write_json(staging / _NOTE, manifests[TRAIN])
    _rename(staging, _pairs(staging, out, manifests, suffixes))


def _pairs(staging: Path, out: str, outputs: Iterable[str], suffixes: tuple[str, ...]) -> list[tuple[Path, Path]]:
    return [
        (joined_path(staging, output, suffix), path_of(out, output + suffix))
        for output in sorted(outputs, reverse=True)
        for suffix in suffixes
    ]


def _rename(staging: Path, pairs: list[tuple[Path, Path]]) -> None:
    for source, target in pairs:
        if source.exists():
            source.rename(target)
    for path in staging.iterdir():
        if path.name not in _LAST:
            path.unlink()
    (staging / _NOTE).unlink()  # after everything that takes time
    shutil.rmtree(staging)
