"""One piece of the input becomes part files: tokens, lengths and, where asked for, digests of its documents.

Part files of piece 12 are 00012.bin, .lengths (int32) and .digests (16 bytes each), of conversations .mask.bin too;
those of held-out documents are called 00012-valid.  They are whole when the record of the piece is there, written
after them: it has their sizes and CRC-32.  A start that finds it so takes the piece as done.
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
from typing import Protocol

import numpy as np

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.files import crc32
from endprompt_megatron.data.answers import MASK, Encoded
from endprompt_megatron.data.corpus.chunks import Piece, Reading
from endprompt_megatron.data.corpus.filters import Filters, digest_of
from endprompt_megatron.data.corpus.readers import documents, place
from endprompt_megatron.data.corpus.rejects import Bad, Skipped

TRAIN, VALID = "", "-valid"
_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 1 << 20


class Encoder(Protocol):
    def encode(self, texts: list[str]) -> list[bytes] | list[Encoded | Bad]: ...


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
        """What is stored of every token: suffix of the file, dtype."""
        return {".bin": self.dtype, **({f"{MASK}.bin": np.dtype(np.uint8)} if self.reading.chat else {})}

    def part(self, number: int, output: str, suffix: str) -> Path:
        """A part file of a piece."""
        return self.staging / f"{number:05d}{output}{suffix}"


@dataclass
class Part:
    """What a piece gave besides its part files: `files` has their names, bytes and CRC-32, `max_ids` by output."""

    files: list[dict]
    max_ids: dict[str, int]
    left_out: dict[str, int]
    bad: dict[str, list]


def tokenise_once(job: Job, number: int, piece: Piece, encoder: Encoder, joined: dict[str, int]) -> Part:
    """The part of a piece: from its record if its files still are what that says, or of tokenising it now.

    Of the pieces before `joined` (by output and stream) the tokens are in the dataset already, and need no file.
    """
    record = job.staging / f".piece_{number:05d}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        part = Part(**json.loads(record.read_text(encoding="utf-8")))
        gone = {
            job.part(number, output, stream).name
            for output in job.outputs
            for stream in job.streams
            if number < joined[output + stream]
        }
        if all(file["file"] in gone or _is_whole(job.staging, file) for file in part.files):
            return part
    part = tokenise_piece(job, number, piece, encoder)
    temporary = _temporary(record)
    temporary.write_text(json.dumps(dataclasses.asdict(part)), encoding="utf-8")
    temporary.rename(record)
    return part


def _is_whole(staging: Path, file: dict) -> bool:
    path = staging / file["file"]
    return path.stat().st_size == file["bytes"] and crc32(path) == file["crc32"]


def tokenise_piece(job: Job, number: int, piece: Piece, encoder: Encoder) -> Part:
    """Tokenise one piece into its part files.  Raises InputError with the place of what is bad, unless skipped."""
    left_out = {"empty": 0, "too_short": 0, "too_long": 0}
    skipped, filters = Skipped(), job.filters
    bos, eos = (b"" if token is None else np.array(token, job.dtype).tobytes() for token in (job.bos, job.eos))
    with contextlib.ExitStack() as stack:
        outputs = {name: stack.enter_context(_Output(job, number, name)) for name in job.outputs}
        for batch in _batches(_good(job, piece, skipped)):
            for (at, text), found in zip(batch, encoder.encode([text for _, text in batch]), strict=True):
                if isinstance(found, Bad):
                    _pass_over(job, piece, at, found, skipped)
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
    return Part(files, max_ids, left_out, skipped.kinds)


def _good(job: Job, piece: Piece, skipped: Skipped) -> Iterator[tuple[int, str]]:
    for number, text in documents(piece, job.reading):
        if isinstance(text, Bad):
            _pass_over(job, piece, number, text, skipped)
        else:
            yield number, text


def _pass_over(job: Job, piece: Piece, number: int, bad: Bad, skipped: Skipped) -> None:
    if not (job.reading.skip_bad and bad.skippable):
        raise InputError(f"{place(piece, number)}: {bad.message}")
    skipped.add(number, bad)


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
    """The part files of a piece for one dataset; they get their names when they are whole."""

    def __init__(self, job: Job, number: int, name: str) -> None:
        self._digested = job.filters.dedup
        self._paths = {suffix: job.part(number, name, suffix) for suffix in (".lengths", ".digests")}
        self._lengths, self._digests = array("i"), bytearray()
        self._streams = {
            suffix: _Stream(job.part(number, name, suffix), dtype) for suffix, dtype in job.streams.items()
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

    def add(self, parts: dict[str, tuple[bytes, ...]], tokens: int, digest: bytes) -> None:
        for suffix, stream in self._streams.items():
            stream.waiting += parts[suffix]
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
    """A part file with a number of `dtype` for each token, and the highest of them."""

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
    """A name of this process's own: a rank that outlives a killed run may still be writing the same piece."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
