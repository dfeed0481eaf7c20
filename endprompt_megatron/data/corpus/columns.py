"""Documents in columns: row groups of a .parquet, record batches of a `datasets` saved to disk.

pyarrow reads both, a few rows at a time; a saved dataset is mapped into memory.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.data.corpus.chat_formats import COLUMNS, conversation_of, format_of
from endprompt_megatron.data.corpus.inputs import ARROW, PARQUET, Source
from endprompt_megatron.data.corpus.rejects import Reject

_ROWS = 1024
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def sizes_of(source: Source, chat: str | None = None) -> list[int]:
    """Bytes of each row group or record batch; where the file is broken, one more of 0 bytes follows.

    `chat`: the format of conversations (chat_formats.py), None for texts.  Raises InputError if there is no such
    column, or it holds no text.
    """
    import pyarrow

    sizes = []
    with contextlib.suppress(pyarrow.ArrowException, OSError):
        if source.kind == ARROW:
            with pyarrow.memory_map(source.path) as file:
                reader = pyarrow.ipc.open_stream(file)
                columns = _columns(reader.schema, source, chat)
                try:
                    for batch in reader:
                        sizes.append(batch.select(columns).nbytes)
                except (pyarrow.ArrowException, OSError):
                    sizes.append(0)
                else:
                    sizes += [0] * _cut_short(source)
        else:
            with _open(source.path) as file:
                _columns(file.schema_arrow, source, chat)
                groups = (file.metadata.row_group(number) for number in range(file.metadata.num_row_groups))
                sizes = [group.total_byte_size for group in groups]
    return sizes


def rows(source: Source, start: int, stop: int, chat: str | None = None) -> Iterator[tuple[int, str | Reject]]:
    """(number, text) of each row of the row groups or record batches `start`..`stop`, numbered from 1 in the file."""
    kind = source.kind
    batches = _batches if source.kind == ARROW else _groups
    # Row groups are read one by one: a damaged one does not affect the others.
    alone = source.kind == PARQUET and start < stop
    for begin, end in [(group, group + 1) for group in range(start, stop)] if alone else [(start, stop)]:
        try:
            for before, batch in batches(source, begin, end, chat):
                read = _conversations(batch, chat) if chat else _texts(batch.column(0), source.text_field)
                yield from enumerate(read, start=before + 1)
        except _Broken as broken:
            yield 0, Reject("broken_file", f"broken {kind} file after row {broken.rows} ({broken.reason})")
        else:
            if start == stop:
                yield 0, Reject("empty_file", f"{kind} file without a row")


class _Broken(Exception):
    """A file that cannot be read further after so many rows."""

    def __init__(self, rows: int, reason: object) -> None:
        self.rows, self.reason = rows, " ".join(str(reason).split())


def _groups(source: Source, start: int, stop: int, chat: str | None) -> Iterator[tuple[int, Any]]:
    """(rows before it, the columns that are read) of a few rows at a time."""
    import pyarrow

    number = 0
    try:
        with _open(source.path) as file:
            number = sum(file.metadata.row_group(group).num_rows for group in range(start))
            columns = _columns(file.schema_arrow, source, chat)
            for batch in file.iter_batches(_ROWS, list(range(start, stop)), columns, use_threads=False):
                yield number, batch
                number += len(batch)
    except (pyarrow.ArrowException, OSError) as error:
        raise _Broken(number, error) from None


def _batches(source: Source, start: int, stop: int, chat: str | None) -> Iterator[tuple[int, Any]]:
    import pyarrow

    number = 0
    try:
        with pyarrow.memory_map(source.path) as file:
            reader = pyarrow.ipc.open_stream(file)
            columns = _columns(reader.schema, source, chat)
            for count in range(stop):
                batch = reader.read_next_batch()
                if count >= start:
                    for first in range(0, len(batch), _ROWS):
                        yield number + first, batch.select(columns).slice(first, _ROWS)
                number += len(batch)
    except StopIteration:  # one batch fewer than sizes_of counted
        raise _Broken(number, "cut short") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise _Broken(number, error) from None


def _texts(column: Any, field: str) -> Iterator[str | Reject]:
    try:
        texts = column.to_pylist()
    except UnicodeDecodeError:
        texts = [_text(value) for value in column]
    for text in texts:
        if text is None:
            yield Reject("not_text", f"{field!r} is null, not text")
        elif isinstance(text, bytes):
            try:
                yield text.decode()
            except UnicodeDecodeError as error:
                yield _not_utf8(error)
        else:
            yield text


def _conversations(batch: Any, chat: str) -> Iterator[str | Reject]:
    for number in range(len(batch)):
        row = {name: _text(column[number]) for name, column in zip(batch.schema.names, batch.columns, strict=True)}
        wrong = next((value for value in row.values() if isinstance(value, Reject)), None)
        yield wrong or conversation_of(row, chat)


def _text(value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return _not_utf8(error)


def _not_utf8(error: UnicodeDecodeError) -> Reject:
    return Reject("not_utf8", f"not UTF-8 at byte {error.start} of the text")


def _open(path: str) -> Any:
    import pyarrow.parquet

    # Read in small blocks: a row group may hold gigabytes.
    return pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)


def _cut_short(source: Source) -> bool:
    with open(source.path, "rb") as file:
        file.seek(max(0, source.bytes - len(_END_OF_STREAM)))
        return file.read() != _END_OF_STREAM


def _columns(schema: Any, source: Source, chat: str | None) -> list[str]:
    """The column with the text, or those that a conversation is made of."""
    import pyarrow

    field, names = source.text_field, schema.names
    if chat:
        found = format_of(names, chat)
        # Where columns hold nulls, a row may say which format it has.
        if isinstance(found, Reject) and found.kind != "ambiguous":
            raise InputError(f"{source.path}: {found.message}")
        return [name for name in names if name in COLUMNS]
    if field not in names:
        raise InputError(
            f"{source.path}: no column {field!r} (columns {', '.join(names[:8])}); --text-field names another"
        )
    kind = schema.field(field).type
    plain = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    # Spark writes text as binary, polars as views, pandas' categories are dictionaries.
    if not any(is_a(plain) for is_a in _texts_in(pyarrow.types)):
        raise InputError(f"{source.path}: column {field!r} is {kind}, not text")
    return [field]


def _texts_in(types: Any) -> tuple:
    """pyarrow's tests of the types that hold text."""
    return (
        *(types.is_string, types.is_large_string, types.is_string_view),
        *(types.is_binary, types.is_large_binary, types.is_binary_view),
    )
