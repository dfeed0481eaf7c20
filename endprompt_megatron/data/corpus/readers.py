"""The documents of a piece: lines of .jsonl, plain or compressed, parts of a .txt; columns.py has the rest.

A document is a text, or a conversation in the one form of chat.py.
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
from endprompt_megatron.data.corpus.chunks import Piece, Reading
from endprompt_megatron.data.corpus.compressed import CompressionError, Decompressed
from endprompt_megatron.data.corpus.inputs import ARROW
from endprompt_megatron.data.corpus.rejects import Bad

_BLOCK = 1 << 20


def documents(piece: Piece, reading: Reading) -> Iterator[tuple[int, str | Bad]]:
    """(number, text) of each document, or what is wrong with it; `place` turns the number into file and line."""
    source = piece.source
    if source.bytes == 0:
        yield 0, Bad("empty_file", "empty file")
    elif source.kind == ".txt":
        yield from _split_txt(piece, reading.split_blank_lines) if reading.split_blank_lines else _whole_txt(piece)
    elif source.kind in (".parquet", ARROW):
        yield from columns.rows(source, piece.start, piece.stop, reading.chat)
    else:
        for number, line in enumerate(_lines(piece), start=1):
            if isinstance(line, Bad):
                yield 0, line
            else:
                yield number, _conversation(line, reading.chat) if reading.chat else _text_of(line, source.text_field)


def place(piece: Piece, number: int) -> str:
    """Where document `number` of the piece stands, as a person looks for it: file:line, or file: row n."""
    source = piece.source
    if number == 0:
        return source.path
    if source.kind in (".parquet", ARROW):
        return f"{source.path}: row {number}"
    if source.kind == ".txt":  # numbered by its first wrong byte, from 1
        return f"{source.path}:{_line_ends(source.path, number - 1)[0] + 1}"
    if piece.start == 0:
        return f"{source.path}:{number}"
    before, cut = _line_ends(source.path, piece.start)
    return f"{source.path}:{before + cut + number}"


def _line_ends(path: str, stop: int) -> tuple[int, bool]:
    """How many lines end before byte `stop`, and whether it stands in the middle of one."""
    before, last = 0, b"\n"
    with open(path, "rb") as file:
        while stop > 0 and (block := file.read(min(stop, _BLOCK))):
            before, stop, last = before + block.count(b"\n"), stop - len(block), block[-1:]
    return before, last != b"\n"


def _lines(piece: Piece) -> Iterator[bytes | Bad]:
    if piece.source.kind == ".jsonl":
        yield from _lines_within(piece)
        return
    read = 0
    name = "gzip" if piece.source.kind == ".jsonl.gz" else "zstd"
    try:
        with open(piece.source.path, "rb") as file:
            for line in io.BufferedReader(Decompressed(file, name), _BLOCK):
                read += 1
                yield line
    except CompressionError as error:
        yield Bad("broken_file", f"broken {name} after line {read} ({error})")
    else:
        if read == 0:
            yield Bad("empty_file", f"{name} of an empty file")


def _lines_within(piece: Piece) -> Iterator[bytes]:
    """The lines that begin inside the piece."""
    with open(piece.source.path, "rb", buffering=_BLOCK) as file:
        at = piece.start
        if at > 0:
            file.seek(at - 1)
            at += len(file.readline()) - 1
        if at >= piece.stop:
            return
        for line in file:
            yield line
            at += len(line)
            if at >= piece.stop:
                return


def _text_of(line: bytes, field: str) -> str | Bad:
    try:
        value = orjson.loads(line)
    except ValueError:
        value = _slowly(line, field)
    if isinstance(value, Bad):
        return value
    if not isinstance(value, dict) or field not in value:
        found = f"keys {', '.join(list(value)[:8])}" if isinstance(value, dict) else type(value).__name__
        return Bad("no_field", f"no field {field!r} ({found}); --text-field names another")
    text = value[field]
    if isinstance(text, str):
        return text
    return Bad("not_text", f"field {field!r} is {'null' if text is None else type(text).__name__}, not text")


def _conversation(line: bytes, asked: str) -> str | Bad:
    try:
        value = orjson.loads(line)
    except ValueError:
        value = _slowly(line)
    return value if isinstance(value, Bad) else conversation_of(value, asked)


def _slowly(line: bytes, field: str | None = None) -> object:
    """What orjson refused: Python's json takes some more of it (NaN), and says what is wrong with the rest."""
    if not line.strip():
        return Bad("empty_line", f"empty line; expected a JSON object{f' with {field!r}' if field else ''}")
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Bad("not_utf8", f"not UTF-8 at byte {error.start} of the line")
    except (ValueError, RecursionError) as error:
        return Bad("not_json", f"not JSON ({error})")
    text = value.get(field) if isinstance(value, dict) else None
    try:
        if isinstance(text, str):
            text.encode()
    except UnicodeEncodeError as error:  # "\ud800" in JSON is half a character
        return Bad("lone_surrogate", f"lone surrogate at character {error.start} of {field!r}; not valid text")
    return value


def _whole_txt(piece: Piece) -> Iterator[tuple[int, str | Bad]]:
    try:
        yield 1, Path(piece.source.path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield error.start + 1, _not_utf8(error.start)


def _split_txt(piece: Piece, blank_lines: int) -> Iterator[tuple[int, str | Bad]]:
    """The documents that begin inside the piece."""
    gap = re.compile(rb"\n(?:[ \t\r]*\n){%d,}" % blank_lines)
    with open(piece.source.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        begin = piece.start
        if begin > 0:
            # A gap begins where its white space does, which may be in the piece before.
            while begin > 0 and content[begin - 1] in b" \t\r\n":
                begin -= 1
            begin = _end_of_gap(gap, content, begin, piece.start)
        while begin < piece.stop:
            found = gap.search(content, begin)
            end, following = found.span() if found else (len(content), len(content))
            document = content[begin:end]
            try:
                yield begin + 1, document.decode("utf-8-sig" if begin == 0 else "utf-8").strip("\r\n")
            except UnicodeDecodeError as error:
                yield begin + error.start + 1, _not_utf8(begin + error.start)
            begin = following


def _end_of_gap(gap: re.Pattern, content: mmap.mmap, at: int, least: int) -> int:
    """Where the first gap from `at` on ends that does not end before `least`."""
    while (found := gap.search(content, at)) and found.end() < least:
        at = found.end()
    return found.end() if found else len(content)


def _not_utf8(byte: int) -> Bad:
    return Bad("not_utf8", f"not UTF-8 at byte {byte}; convert it first")
