"""The part files of all pieces become one dataset, in the order of the input, and each only once on the disk.

A part is removed when its tokens are in the dataset and on the disk, and a record (`.joined.json`) says up to which
piece that is so, with the bytes and CRC-32 that each gave: a run that was killed while joining goes on from there.
What is stored beside the tokens, the mask of conversations, is joined in the same way.
"""

import contextlib
import errno
import json
import os
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from endprompt_megatron.common.files import write_text
from endprompt_megatron.data.answers import MASK
from endprompt_megatron.data.corpus.filters import first_of_each
from endprompt_megatron.data.corpus.tokenise import Job, Part
from endprompt_megatron.data.indexed import write_idx

_RECORD_BYTES = 256 << 20
_BLOCK = 16 << 20
_CANNOT_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class Joined:
    """A dataset in the staging directory: `lengths` of its documents in tokens (int32).

    `bounds` are the first document of each piece, and the end; `duplicates` counts the copies that were left out;
    `answers`, of conversations, the tokens that are answers.
    """

    lengths: np.ndarray
    bounds: np.ndarray
    duplicates: int
    max_id: int
    answers: int | None = None


def joined_path(staging: Path, output: str, suffix: str) -> Path:
    """The whole dataset's file before it gets its name."""
    return staging / f"joined{output}{suffix}"


def join(job: Job, parts: list[Part], output: str) -> Joined:
    """Write joined.bin and joined.idx of one output from its parts, and those of the mask."""
    numbers = range(len(parts))
    lengths = [np.fromfile(job.part(number, output, ".lengths"), dtype=np.int32) for number in numbers]
    counts = [len(piece) for piece in lengths]
    bounds = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    kept = None
    if job.filters.dedup:
        kept = first_of_each([job.part(number, output, ".digests") for number in numbers])
    for stream, dtype in job.streams.items():
        _join_stream(job, parts, output, stream, dtype, lengths, None if kept is None else np.split(kept, bounds[1:-1]))
    everything = np.concatenate(lengths)
    if kept is not None:
        everything = everything[kept]
        bounds = np.concatenate([[0], np.cumsum(kept, dtype=np.int64)])[bounds]
    for stream, dtype in job.streams.items():
        write_idx(joined_path(job.staging, output, stream.replace(".bin", ".idx")), everything, dtype)
    highest = max((part.max_ids[output] for part in parts), default=0)
    mask = joined_path(job.staging, output, f"{MASK}.bin")
    answers = _ones(mask) if job.reading.chat else None
    return Joined(everything, bounds, sum(counts) - len(everything), highest, answers)


def _ones(mask: Path) -> int:
    total = 0
    with open(mask, "rb") as file:
        while block := file.read(_BLOCK):
            total += block.count(1)
    return total


def already_joined(job: Job, output: str, stream: str) -> list[list[int]]:
    """[bytes, CRC-32] of each piece whose tokens an earlier start put into the dataset, as far as they are there."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        recorded = json.loads(_record(job, output, stream).read_text(encoding="utf-8"))
        whole = []
        with open(joined_path(job.staging, output, stream), "rb") as file:
            for count, sum_ in recorded:
                left, found = count, 0
                while left and (block := file.read(min(left, _BLOCK))):
                    left, found = left - len(block), zlib.crc32(block, found)
                if left or found != sum_:
                    break
                whole.append([count, sum_])
        return whole
    return []


def _record(job: Job, output: str, stream: str) -> Path:
    return job.staging / f".joined{output}{stream.removesuffix('.bin')}.json"


def _join_stream(
    job: Job,
    parts: list[Part],
    output: str,
    stream: str,
    dtype: np.dtype,
    lengths: list[np.ndarray],
    kept: list[np.ndarray] | None,
) -> None:
    path = joined_path(job.staging, output, stream)
    done = already_joined(job, output, stream)
    waiting = [job.part(number, output, stream) for number in range(len(done))]
    path.touch()
    with open(path, "r+b", buffering=1 << 20) as joined:
        joined.truncate(joined.seek(sum(count for count, _ in done)))
        unsaved = 0
        for number in range(len(done), len(parts)):
            part = job.part(number, output, stream)
            with open(part, "rb") as source:
                if kept is None or kept[number].all():
                    [file] = [file for file in parts[number].files if file["file"] == part.name]
                    _copy(source, joined, file["bytes"])
                    done.append([file["bytes"], file["crc32"]])
                else:
                    done.append(_copy_some(source, joined, lengths[number], kept[number], dtype))
            waiting.append(part)
            unsaved += done[-1][0]
            if unsaved >= _RECORD_BYTES or number == len(parts) - 1:
                joined.flush()
                os.fsync(joined.fileno())
                write_text(_record(job, output, stream), json.dumps(done))
                for piece in waiting:
                    piece.unlink(missing_ok=True)
                waiting, unsaved = [], 0


def _copy(source: BinaryIO, target: BinaryIO, count: int) -> None:
    """All `count` bytes of a file, within the kernel where it can."""
    target.flush()
    at, done = target.tell(), 0
    with contextlib.suppress(AttributeError):  # not every system has it
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
    """The tokens of the documents that are kept: [bytes, CRC-32]."""
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]) * dtype.itemsize
    edges = np.flatnonzero(np.diff(np.concatenate([[0], kept.astype(np.int8), [0]])))
    total = sum_ = 0
    for begin, end in offsets[edges].reshape(-1, 2).tolist():
        source.seek(begin)
        while begin < end and (block := source.read(min(end - begin, _BLOCK))):
            target.write(block)
            begin += len(block)
            total += len(block)
            sum_ = zlib.crc32(block, sum_)
    return [total, sum_]
