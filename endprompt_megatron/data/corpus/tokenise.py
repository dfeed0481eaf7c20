"""One chunk of the input becomes files: tokens, lengths and, where asked for, digests of its documents.

Files of chunk 12 are 00012.bin, .lengths (int32) and .digests (16 bytes each), of conversations .mask.bin too; those of
held-out documents are called 00012-valid.  They are complete when the record of the chunk is there, which is written
after them and has their sizes and CRC-32.  A later start takes a chunk as done if its files agree with its record.
"""

import contextlib
import dataclasses
import json
import os
import socket
import zlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.files import crc32
from endprompt_megatron.data.corpus.chunks import Chunk, Reading
from endprompt_megatron.data.corpus.encoders import Encoded, Encoder
from endprompt_megatron.data.corpus.filters import Filters, digest_of
from endprompt_megatron.data.corpus.readers import documents, place
from endprompt_megatron.data.corpus.rejects import Reject, Skipped
from endprompt_megatron.data.indexed import MASK

TRAIN, VALID = "", "-valid"
_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Job:
    """What every worker needs to know; `bos` and `eos` are ids, None for none."""

    staging: Path
    reading: Reading
    filters: Filters
    dtype: np.dtype
    bos: int | None
    eos: int | None

    @property
    def outputs(self) -> tuple[str, ...]:
        """What is appended to the prefix of each dataset that is written."""
        return (TRAIN, VALID) if self.filters.held_out else (TRAIN,)

    @property
    def streams(self) -> dict[str, np.dtype]:
        """What is stored of each token: suffix of the file, dtype."""
        return {".bin": self.dtype, **({f"{MASK}.bin": np.dtype(np.uint8)} if self.reading.chat else {})}

    def chunk_file(self, number: int, output: str, suffix: str) -> Path:
        """A file of chunk `number`."""
        return self.staging / f"{number:05d}{output}{suffix}"


@dataclass
class Tokenised:
    """What a chunk gave besides its files: `files` has their names, bytes and CRC-32, `max_ids` is by output.

    `bad`: rejects by kind, as rejects.Skipped counts them.
    """

    files: list[dict]
    max_ids: dict[str, int]
    left_out: dict[str, int]
    bad: dict[str, list]


def tokenise_once(job: Job, number: int, chunk: Chunk, encoder: Encoder, joined: dict[str, int]) -> Tokenised:
    """What a chunk gave: read from its record if the files still agree with it, otherwise the chunk is tokenised.

    The tokens of chunks before `joined` (by output and stream) are in the dataset already and need no file.
    """
    record = job.staging / f".piece_{number:05d}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        tokenised = Tokenised(**json.loads(record.read_text(encoding="utf-8")))
        gone = {
            job.chunk_file(number, output, stream).name
            for output in job.outputs
            for stream in job.streams
            if number < joined[output + stream]
        }
        if all(file["file"] in gone or _is_complete(job.staging, file) for file in tokenised.files):
            return tokenised
    tokenised = tokenise_chunk(job, number, chunk, encoder)
    temporary = _temporary(record)
    temporary.write_text(json.dumps(dataclasses.asdict(tokenised)), encoding="utf-8")
    temporary.rename(record)
    return tokenised


def _is_complete(staging: Path, file: dict) -> bool:
    path = staging / file["file"]
    return path.stat().st_size == file["bytes"] and crc32(path) == file["crc32"]


def tokenise_chunk(job: Job, number: int, chunk: Chunk, encoder: Encoder) -> Tokenised:
    """Tokenise one chunk into its files.  Raises InputError with the place of a reject, unless rejects are skipped."""
    left_out = {"empty": 0, "too_short": 0, "too_long": 0}
    skipped, filters = Skipped(), job.filters
    bos, eos = (b"" if token is None else np.array(token, job.dtype).tobytes() for token in (job.bos, job.eos))
    with contextlib.ExitStack() as stack:
        outputs = {name: stack.enter_context(_Output(job, number, name)) for name in job.outputs}
        for batch in _batches(_accepted(job, chunk, skipped)):
            for (at, text), found in zip(batch, encoder.encode([text for _, text in batch]), strict=True):
                if isinstance(found, Reject):
                    _skip(job, chunk, at, found, skipped)
                    continue
                ids, mask = found if isinstance(found, Encoded) else (found, b"")
                tokens = (len(bos) + len(ids) + len(eos)) // job.dtype.itemsize
                if not ids:
                    left_out["empty"] += 1
                elif tokens < filters.min_tokens:
                    left_out["too_short"] += 1
                elif filters.max_tokens is not None and tokens > filters.max_tokens:
                    left_out["too_long"] += 1
                else:
                    digest = digest_of(text) if filters.digests else b""
                    held_out = filters.held_out > 0 and filters.is_held_out(digest)
                    outputs[VALID if held_out else TRAIN].add(
                        {".bin": (bos, ids, eos), f"{MASK}.bin": (mask,)}, tokens, digest
                    )
            for output in outputs.values():
                output.flush()
        files = [file for output in outputs.values() for file in output.finish()]
    max_ids = {name: output.max_id for name, output in outputs.items()}
    return Tokenised(files, max_ids, left_out, skipped.kinds)


def _accepted(job: Job, chunk: Chunk, skipped: Skipped) -> Iterator[tuple[int, str]]:
    for number, text in documents(chunk, job.reading):
        if isinstance(text, Reject):
            _skip(job, chunk, number, text, skipped)
        else:
            yield number, text


def _skip(job: Job, chunk: Chunk, number: int, reject: Reject, skipped: Skipped) -> None:
    if not (job.reading.skip_bad and reject.skippable):
        skip = "; with --skip-bad it is left out" if reject.skippable else ""
        raise InputError(f"{place(chunk, number)}: {reject.message}{skip}")
    skipped.add(number, reject)


def _batches(texts: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    batch, characters = [], 0
    for number, text in texts:
        batch.append((number, text))
        characters += len(text)
        if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _Output:
    """The files of a chunk for one dataset; they get their names when they are complete."""

    def __init__(self, job: Job, number: int, name: str) -> None:
        self._digested = job.filters.dedup
        self._paths = {suffix: job.chunk_file(number, name, suffix) for suffix in (".lengths", ".digests")}
        self._lengths, self._digests = array("i"), bytearray()
        self._streams = {
            suffix: _Stream(job.chunk_file(number, name, suffix), dtype) for suffix, dtype in job.streams.items()
        }

    @property
    def max_id(self) -> int:
        return self._streams[".bin"].highest

    def __enter__(self) -> "_Output":
        self._open = contextlib.ExitStack()
        for stream in self._streams.values():
            self._open.enter_context(stream)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def add(self, stored: dict[str, tuple[bytes, ...]], tokens: int, digest: bytes) -> None:
        for suffix, stream in self._streams.items():
            stream.waiting += stored[suffix]
        self._lengths.append(tokens)
        if self._digested:
            self._digests += digest

    def flush(self) -> None:
        """Write what was added since the last time."""
        for stream in self._streams.values():
            stream.flush()

    def finish(self) -> list[dict]:
        """Let the files appear; name, bytes and CRC-32 of each."""
        files = [stream.finish() for stream in self._streams.values()]
        for suffix, data in ((".lengths", self._lengths.tobytes()), (".digests", bytes(self._digests))):
            if suffix == ".digests" and not self._digested:
                continue
            path = self._paths[suffix]
            _temporary(path).write_bytes(data)
            _temporary(path).rename(path)
            files.append({"file": path.name, "bytes": len(data), "crc32": zlib.crc32(data)})
        return files


class _Stream:
    """A file of a chunk with a number of `dtype` for each token, and the highest of them."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self._path, self._dtype = path, dtype
        self.waiting: list[bytes] = []
        self._bytes = self._crc32 = self.highest = 0

    def __enter__(self) -> "_Stream":
        self._file = open(_temporary(self._path), "wb", buffering=0)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def flush(self) -> None:
        if self.waiting:
            data = b"".join(self.waiting)
            self.waiting.clear()
            self.highest = max(self.highest, int(np.frombuffer(data, self._dtype).max()))
            self._crc32 = zlib.crc32(data, self._crc32)
            self._bytes += len(data)
            _write(self._file, data)

    def finish(self) -> dict:
        _temporary(self._path).rename(self._path)
        return {"file": self._path.name, "bytes": self._bytes, "crc32": self._crc32}


def _write(file, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def _temporary(path: Path) -> Path:
    """A name of this process's own: a rank that outlives a killed run may still be writing the same chunk."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
