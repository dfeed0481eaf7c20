"""The documents of a chunk: lines of .jsonl, plain or compressed, texts of a .txt; columns.py has the other kinds.

A document is a text, or a conversation in the one form of chat_formats.py.
"""

import io
import json
import mmap
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import orjson

from endprompt_megatron.data.corpus import columns
from endprompt_megatron.data.corpus.chat_formats import conversation_of
from endprompt_megatron.data.corpus.chunks import Chunk, Reading
from endprompt_megatron.data.corpus.inputs import ARROW
from endprompt_megatron.data.corpus.rejects import Reject

_BLOCK = 1 << 20
_COMPRESSED_BLOCK = 1 << 12  # bytes at once: the most extreme zstd makes 128 MiB of them


def documents(chunk: Chunk, reading: Reading) -> Iterator[tuple[int, str | Reject]]:
    """(number, text) of each document, or a Reject; `place` turns the number into file and line."""
    source = chunk.source
    if source.bytes == 0:
        yield 0, Reject("empty_file", "empty file")
    elif source.kind == ".txt":
        yield from _split_txt(chunk, reading.split_blank_lines) if reading.split_blank_lines else _whole_txt(chunk)
    elif source.kind in (".parquet", ARROW):
        yield from columns.rows(source, chunk.start, chunk.stop, reading.chat)
    else:
        for number, line in enumerate(_lines(chunk), start=1):
            if isinstance(line, Reject):
                yield 0, line
            else:
                yield number, _conversation(line, reading.chat) if reading.chat else _text_of(line, source.text_field)


def place(chunk: Chunk, number: int) -> str:
    """Where document `number` of the chunk stands, for people: file:line, or file: row n."""
    source = chunk.source
    if number == 0:
        return source.path
    if source.kind in (".parquet", ARROW):
        return f"{source.path}: row {number}"
    if source.kind == ".txt":  # numbered by its first wrong byte, from 1
        return f"{source.path}:{_line_ends(source.path, number - 1)[0] + 1}"
    if chunk.start == 0:
        return f"{source.path}:{number}"
    before, cut = _line_ends(source.path, chunk.start)
    return f"{source.path}:{before + cut + number}"


def _line_ends(path: str, stop: int) -> tuple[int, bool]:
    """How many lines end before byte `stop`, and whether it stands in the middle of one."""
    before, last = 0, b"\n"
    with open(path, "rb") as file:
        while stop > 0 and (block := file.read(min(stop, _BLOCK))):
            before, stop, last = before + block.count(b"\n"), stop - len(block), block[-1:]
    return before, last != b"\n"


def _lines(chunk: Chunk) -> Iterator[bytes | Reject]:
    if chunk.source.kind == ".jsonl":
        yield from _lines_within(chunk)
        return
    read = 0
    name = "gzip" if chunk.source.kind == ".jsonl.gz" else "zstd"
    try:
        with open(chunk.source.path, "rb") as file:
            for line in io.BufferedReader(Decompressed(file, name), _BLOCK):
                read += 1
                yield line
    except CompressionError as error:
        yield Reject("broken_file", f"broken {name} after line {read} ({error})")
    else:
        if read == 0:
            yield Reject("empty_file", f"{name} of an empty file")


def _lines_within(chunk: Chunk) -> Iterator[bytes]:
    """The lines that begin inside the chunk."""
    with open(chunk.source.path, "rb", buffering=_BLOCK) as file:
        at = chunk.start
        if at > 0:
            file.seek(at - 1)
            at += len(file.readline()) - 1
        if at >= chunk.stop:
            return
        for line in file:
            yield line
            at += len(line)
            if at >= chunk.stop:
                return


def _text_of(line: bytes, field: str) -> str | Reject:
    try:
        value = orjson.loads(line)
    except ValueError:
        value = _slowly(line, field)
    if isinstance(value, Reject):
        return value
    if not isinstance(value, dict) or field not in value:
        found = f"keys {', '.join(list(value)[:8])}" if isinstance(value, dict) else type(value).__name__
        return Reject("no_field", f"no field {field!r} ({found}); --text-field names another")
    text = value[field]
    if isinstance(text, str):
        return text
    return Reject("not_text", f"field {field!r} is {'null' if text is None else type(text).__name__}, not text")


def _conversation(line: bytes, asked: str) -> str | Reject:
    try:
        value = orjson.loads(line)
    except ValueError:
        value = _slowly(line)
    return value if isinstance(value, Reject) else conversation_of(value, asked)


def _slowly(line: bytes, field: str | None = None) -> object:
    """A line that orjson refused: Python's json accepts more (NaN), and says what is wrong with the rest."""
    if not line.strip():
        return Reject("empty_line", f"empty line; expected a JSON object{f' with {field!r}' if field else ''}")
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Reject("not_utf8", f"not UTF-8 at byte {error.start} of the line")
    except (ValueError, RecursionError) as error:
        return Reject("not_json", f"not JSON ({error})")
    text = value.get(field) if isinstance(value, dict) else None
    try:
        if isinstance(text, str):
            text.encode()
    except UnicodeEncodeError as error:  # "\ud800" in JSON is half a character
        return Reject("lone_surrogate", f"lone surrogate at character {error.start} of {field!r}; not valid text")
    return value


def _whole_txt(chunk: Chunk) -> Iterator[tuple[int, str | Reject]]:
    try:
        yield 1, Path(chunk.source.path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield error.start + 1, _not_utf8(error.start)


def _split_txt(chunk: Chunk, blank_lines: int) -> Iterator[tuple[int, str | Reject]]:
    """The documents that begin inside the chunk."""
    gap = re.compile(rb"\n(?:[ \t\r]*\n){%d,}" % blank_lines)
    with open(chunk.source.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        begin = chunk.start
        if begin > 0:
            # A gap begins where its white space does, which may be in the chunk before.
            while begin > 0 and content[begin - 1] in b" \t\r\n":
                begin -= 1
            begin = _end_of_gap(gap, content, begin, chunk.start)
        while begin < chunk.stop:
            found = gap.search(content, begin)
            end, following = found.span() if found else (len(content), len(content))
            document = content[begin:end]
            try:
                yield begin + 1, document.decode("utf-8-sig" if begin == 0 else "utf-8").strip("\r\n")
            except UnicodeDecodeError as error:
                yield begin + error.start + 1, _not_utf8(begin + error.start)
            begin = following


def _end_of_gap(gap: re.Pattern, content: mmap.mmap, at: int, min_end: int) -> int:
    """Where the first gap from `at` on ends that ends at `min_end` or later."""
    while (found := gap.search(content, at)) and found.end() < min_end:
        at = found.end()
    return found.end() if found else len(content)


def _not_utf8(byte: int) -> Reject:
    return Reject("not_utf8", f"not UTF-8 at byte {byte}; convert it first")


class CompressionError(Exception):
    """The file is cut short or damaged; what could be read before was."""


class Decompressed(io.RawIOBase):
    """What a .gz or .zst holds, as a file: a few megabytes of it at a time, and all of it up to where it breaks.

    `name` is gzip or zstd; several frames one after the other are one file.  Raises CompressionError.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name
        self._frame = self._begin()
        self._begun = False  # whether something of the frame was read
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._ready:
            data = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._begun = self._begin(), False
            data = data or self._file.read(_COMPRESSED_BLOCK)
            if not data:
                if self._begun:
                    raise CompressionError("it is cut short")
                return 0
            if not self._begun and self._name == "gzip" and not data.strip(b"\0"):
                continue  # gzip allows zeros after its frames, as tapes have them
            try:
                self._ready = memoryview(self._frame.decompress(data))
            except self._errors as error:
                raise CompressionError(str(error)) from None
            self._begun = True
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _begin(self):
        if self._name == "gzip":
            self._errors: tuple[type[Exception], ...] = (zlib.error,)
            return zlib.decompressobj(31)
        import zstandard

        self._errors = (zstandard.ZstdError,)
        return zstandard.ZstdDecompressor().decompressobj()
