"""Text files as pieces of work and as documents: .txt, .jsonl, .jsonl.gz, .parquet.

A piece is what one worker reads at a time: a byte range of a .jsonl, a row group of a .parquet, a whole
.txt or .jsonl.gz (gzip cannot be entered in the middle; several files share the work).  Pieces depend on
the files alone, never on the number of workers, and their order is the order of the documents.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from endprompt_megatron.errors import InputError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
_PIECE_BYTES = 8 << 20
_MOST_PIECES = 4096
_GZIP_RATIO = 4  # text shrinks about so much: keeps shares of work balanced


@dataclass(frozen=True)
class Reading:
    """How documents are taken from files: the field of .jsonl and .parquet, and where a .txt is split."""

    text_field: str = "text"
    split_blank_lines: int = 0  # a .txt is split where this many blank lines stand; 0: one document


@dataclass(frozen=True)
class Piece:
    """`start`..`stop` of a file: bytes of a .jsonl, row groups of a .parquet; `work` in bytes of text, about."""

    path: str
    suffix: str
    start: int
    stop: int
    work: int


def pieces_of(paths: list[str], reading: Reading) -> list[Piece]:
    """Pieces of all files, in order.  Raises InputError for what is missing, empty, unreadable or of unknown kind."""
    sizes = [_checked_size(path) for path in paths]
    step = max(_PIECE_BYTES, -(-sum(sizes) // _MOST_PIECES))
    pieces = []
    for path, size in zip(paths, sizes, strict=True):
        suffix = _suffix(path)
        if suffix == ".jsonl":
            starts = range(0, size, step)
            pieces += [Piece(path, suffix, start, min(start + step, size), min(step, size - start)) for start in starts]
        elif suffix == ".parquet":
            metadata = _open_parquet(path, reading).metadata
            for group in range(metadata.num_row_groups):
                pieces.append(Piece(path, suffix, group, group + 1, metadata.row_group(group).total_byte_size))
        else:
            pieces.append(Piece(path, suffix, 0, size, size * _GZIP_RATIO if suffix == ".jsonl.gz" else size))
    return pieces


def documents(piece: Piece, reading: Reading) -> Iterator[tuple[int, str]]:
    """(number, text) of each document; `place` turns the number into file and line.

    Raises InputError with the place for a line or row that does not give a text.
    """
    if piece.suffix == ".txt":
        yield from _txt(piece, reading)
    elif piece.suffix == ".parquet":
        yield from _parquet(piece, reading)
    else:
        lines = _jsonl_lines(piece) if piece.suffix == ".jsonl" else _gzip_lines(piece)
        for number, line in enumerate(lines, start=1):
            yield number, _text_of(line, piece, number, reading)


def place(piece: Piece, number: int) -> str:
    """Where document `number` of the piece stands, as a person looks for it: file:line, or file: row n."""
    if piece.suffix == ".txt":
        return piece.path
    if piece.suffix == ".parquet":
        return f"{piece.path}: row {number}"
    with open(piece.path, "rb") as file:
        before, left = 0, piece.start
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            before, left = before + block.count(b"\n"), left - len(block)
        # The piece begins in the middle of a line, which belongs to the piece before.
        file.seek(max(piece.start - 1, 0))
        cut = piece.start > 0 and file.read(1) != b"\n"
    return f"{piece.path}:{before + cut + number}"


def _checked_size(path: str) -> int:
    file = Path(path)
    if file.is_dir():
        raise InputError(f"--input {path}: is a directory; name its files, for example {path}/*.jsonl")
    if not file.is_file():
        raise InputError(f"--input {path}: no such file")
    if not _suffix(path):
        raise InputError(f"--input {path}: unknown kind of file; use {', '.join(SUFFIXES)}")
    try:
        with open(file, "rb") as opened:
            opened.read(1)
    except OSError as error:
        raise InputError(f"--input {path}: cannot be read ({error.strerror})") from None
    return file.stat().st_size


def _suffix(path: str) -> str:
    return next((suffix for suffix in SUFFIXES if path.endswith(suffix)), "")


def _txt(piece: Piece, reading: Reading) -> Iterator[tuple[int, str]]:
    try:
        text = Path(piece.path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{piece.path}: not UTF-8 at byte {error.start}; convert it first") from None
    if not reading.split_blank_lines:
        yield 1, text
        return
    blank = rf"\n(?:[ \t\r]*\n){{{reading.split_blank_lines},}}"
    for number, part in enumerate(re.split(blank, text), start=1):
        yield number, part.strip("\r\n")


def _jsonl_lines(piece: Piece) -> Iterator[bytes]:
    """The lines that begin inside the piece."""
    with open(piece.path, "rb") as file:
        at = piece.start
        if at > 0:
            file.seek(at - 1)
            at += len(file.readline()) - 1
        while at < piece.stop and (line := file.readline()):
            at += len(line)
            yield line


def _gzip_lines(piece: Piece) -> Iterator[bytes]:
    read = 0
    try:
        with gzip.open(piece.path, "rb") as file:
            for line in file:
                read += 1
                yield line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{piece.path}: broken gzip after line {read} ({error})") from None


def _text_of(line: bytes, piece: Piece, number: int, reading: Reading) -> str:
    field = reading.text_field
    if not line.strip():
        raise InputError(f"{place(piece, number)}: empty line; expected a JSON object with {field!r}")
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place(piece, number)}: not JSON ({error})") from None
    if not isinstance(value, dict) or field not in value:
        found = f"keys {', '.join(list(value)[:8])}" if isinstance(value, dict) else type(value).__name__
        raise InputError(f"{place(piece, number)}: no field {field!r} ({found}); --text-field names another")
    if not isinstance(value[field], str):
        raise InputError(f"{place(piece, number)}: field {field!r} is {type(value[field]).__name__}, not text")
    return value[field]


def _open_parquet(path: str, reading: Reading):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"--input {path}: reading .parquet needs pyarrow (pip install pyarrow)") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"--input {path}: not a readable .parquet ({' '.join(str(error).split())})") from None
    schema = file.schema_arrow
    if reading.text_field not in schema.names:
        columns = ", ".join(schema.names[:8])
        raise InputError(f"{path}: no column {reading.text_field!r} (columns {columns}); --text-field names another")
    kind = schema.field(reading.text_field).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise InputError(f"{path}: column {reading.text_field!r} is {kind}, not text")
    return file


def _parquet(piece: Piece, reading: Reading) -> Iterator[tuple[int, str]]:
    import pyarrow

    file = _open_parquet(piece.path, reading)
    number = sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
    groups = list(range(piece.start, piece.stop))
    try:
        for batch in file.iter_batches(batch_size=1024, row_groups=groups, columns=[reading.text_field]):
            for text in batch.column(0).to_pylist():
                number += 1
                if text is None:
                    raise InputError(f"{place(piece, number)}: {reading.text_field!r} is null, not text")
                yield number, text
    except (OSError, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise InputError(f"{piece.path}: broken .parquet ({' '.join(str(error).split())})") from None
