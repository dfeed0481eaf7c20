"""The documents of a chunk: lines or records of JSON, texts, plain or compressed; columns.py has the other kinds.

A document is a text, or a conversation in the one form of chat_formats.py.
"""

import io
import json
import mmap
import re
from collections.abc import Iterator
from pathlib import Path

import orjson

from endprompt_megatron.data.corpus import columns
from endprompt_megatron.data.corpus.chat_formats import conversation_of
from endprompt_megatron.data.corpus.chunks import Chunk, Reading
from endprompt_megatron.data.corpus.decompress import CompressionError, Decompressed
from endprompt_megatron.data.corpus.inputs import ARROW, JSON, LINES, PARQUET, TEXT
from endprompt_megatron.data.corpus.rejects import Reject

_BLOCK = 1 << 20


def documents(chunk: Chunk, reading: Reading) -> Iterator[tuple[int, str | Reject]]:
    """(number, text) of each document, or a Reject; `place` turns the number into file and line."""
    source = chunk.source
    if source.bytes == 0:
        yield 0, Reject("empty_file", "empty file")
    elif source.kind in (PARQUET, ARROW):
        yield from columns.rows(source, chunk.start, chunk.stop, reading.chat)
    elif source.kind == LINES:
        for number, line in enumerate(_lines(chunk), start=1):
            if isinstance(line, Reject):
                yield 0, line
            elif not line.isspace():  # a blank line holds no document that could be lost
                yield number, _document(_value(line, source.text_field), source.text_field, reading.chat)
    else:
        try:
            read = _records if source.kind == JSON else _texts
            yield from read(chunk, reading)
        except CompressionError as error:
            yield 0, Reject("broken_file", f"broken {source.compression} ({error})")


def place(chunk: Chunk, number: int) -> str:
    """Where document `number` of the chunk stands, for people: file:line, or file: row n."""
    source = chunk.source
    if number == 0:
        return source.path
    if source.kind in (PARQUET, ARROW):
        return f"{source.path}: row {number}"
    if source.kind == JSON:
        return f"{source.path}: record {number}"
    if source.kind == TEXT:  # numbered by its first wrong byte, from 1
        if source.compression:
            return f"{source.path}: byte {number - 1} of its text"
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
    name = chunk.source.compression
    if not name:
        yield from _lines_within(chunk)
        return
    read = 0
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


def _document(value: object, field: str, chat: str | None) -> str | Reject:
    """The text or the conversation in a record of JSON."""
    if isinstance(value, Reject):
        return value
    if chat:
        return conversation_of(value, chat)
    if not isinstance(value, dict) or field not in value:
        found = f"keys {', '.join(list(value)[:8])}" if isinstance(value, dict) else type(value).__name__
        return Reject("no_field", f"no field {field!r} ({found}); --text-field names another")
    text = value[field]
    if isinstance(text, str):
        return text
    return Reject("not_text", f"field {field!r} is {'null' if text is None else type(text).__name__}, not text")


def _value(line: bytes, field: str) -> object:
    """What a line of JSON holds, or a Reject."""
    try:
        return orjson.loads(line)
    except ValueError:
        pass  # Python's json accepts more (NaN), and says what is wrong with the rest
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Reject("not_utf8", f"not UTF-8 at byte {error.start} of the line")
    except (ValueError, RecursionError) as error:
        return Reject("not_json", f"not JSON ({error})")
    return _without_surrogates(value, field)


def _without_surrogates(value: object, field: str) -> object:
    text = value.get(field) if isinstance(value, dict) else None
    try:
        if isinstance(text, str):
            text.encode()
    except UnicodeEncodeError as error:  # "\ud800" in JSON is half a character
        return Reject("lone_surrogate", f"lone surrogate at character {error.start} of {field!r}; not valid text")
    return value


def _records(chunk: Chunk, reading: Reading) -> Iterator[tuple[int, str | Reject]]:
    """The elements of one JSON array, or the objects of a file that writes each over several lines."""
    field = chunk.source.text_field
    try:
        content = _content(chunk).decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        yield 0, _not_utf8(error.start)
        return
    if content.startswith("["):
        # At once: it has to be read to its end before the first element is known to be one.
        try:
            values: list = orjson.loads(content)
        except ValueError:
            try:
                values = json.loads(content)
            except (ValueError, RecursionError) as error:
                yield 0, Reject("not_json", f"not a JSON array ({error})")
                return
        if not values:
            yield 0, Reject("empty_file", "an array without elements")
    else:
        values = _objects(content)
    for number, value in enumerate(values, start=1):
        yield number, _document(_without_surrogates(value, field), field, reading.chat)


def _objects(content: str) -> Iterator[object]:
    decoder, at = json.JSONDecoder(), 0
    while at < len(content):
        try:
            value, at = decoder.raw_decode(content, at)
        except (ValueError, RecursionError) as error:
            yield Reject("not_json", f"not JSON ({error})")
            return
        yield value
        while at < len(content) and content[at].isspace():
            at += 1


def _content(chunk: Chunk) -> bytes:
    """All bytes of a source, decompressed.  Raises CompressionError."""
    source = chunk.source
    if not source.compression:
        return Path(source.path).read_bytes()
    with open(source.path, "rb") as file:
        return io.BufferedReader(Decompressed(file, source.compression), _BLOCK).read()


def _texts(chunk: Chunk, reading: Reading) -> Iterator[tuple[int, str | Reject]]:
    blank_lines = reading.split_blank_lines
    if blank_lines and not chunk.source.compression:
        with open(chunk.source.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            yield from _split_text(content, chunk.start, chunk.stop, blank_lines)
        return
    content = _content(chunk)
    if not content:
        yield 0, Reject("empty_file", f"{chunk.source.compression} of an empty file")
    elif blank_lines:
        yield from _split_text(content, 0, len(content), blank_lines)
    else:
        try:
            yield 1, content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            yield error.start + 1, _not_utf8(error.start)


def _split_text(
    content: bytes | mmap.mmap, start: int, stop: int, blank_lines: int
) -> Iterator[tuple[int, str | Reject]]:
    """The documents that begin in `start`..`stop`."""
    gap = re.compile(rb"\n(?:[ \t\r]*\n){%d,}" % blank_lines)
    begin = start
    if begin > 0:
        # A gap begins where its white space does, which may be in the chunk before.
        while begin > 0 and content[begin - 1] in b" \t\r\n":
            begin -= 1
        begin = _end_of_gap(gap, content, begin, start)
    while begin < stop:
        found = gap.search(content, begin)
        end, following = found.span() if found else (len(content), len(content))
        document = content[begin:end]
        try:
            yield begin + 1, document.decode("utf-8-sig" if begin == 0 else "utf-8").strip("\r\n")
        except UnicodeDecodeError as error:
            yield begin + error.start + 1, _not_utf8(begin + error.start)
        begin = following


def _end_of_gap(gap: re.Pattern, content: bytes | mmap.mmap, at: int, min_end: int) -> int:
    """Where the first gap from `at` on ends that ends at `min_end` or later."""
    while (found := gap.search(content, at)) and found.end() < min_end:
        at = found.end()
    return found.end() if found else len(content)


def _not_utf8(byte: int) -> Reject:
    return Reject("not_utf8", f"not UTF-8 at byte {byte}; convert it first")
