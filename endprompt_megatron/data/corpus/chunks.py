"""Sources as chunks of work: what one worker reads at a time.

A chunk is a byte range of JSON lines or of a text that is split, row groups of a .parquet, record batches of a saved
dataset, or a complete file: one that is compressed or a JSON array, which cannot be read from the middle, and a text
that is one document.  Chunks depend on the files alone, never on the number of workers, and their order is the order
of the documents.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from endprompt_megatron.data.corpus import columns
from endprompt_megatron.data.corpus.inputs import ARROW, LINES, PARQUET, TEXT, Source

_CHUNK_BYTES = 8 << 20
_MAX_CHUNKS = 4096
# Text shrinks by about so much: this balances the ranks' shares.
_RATIOS = {"gzip": 4, "zstd": 5, "bzip2": 5, "xz": 6}


@dataclass(frozen=True)
class Reading:
    """How documents are taken from sources, and whether a bad one is skipped or ends the work."""

    split_blank_lines: int = 0  # a .txt is split where this many blank lines stand; 0: one document
    skip_bad: bool = False
    chat: str | None = None  # documents are conversations in this format of chat_formats.py; None: texts


@dataclass(frozen=True)
class Chunk:
    """`start`..`stop` of a source: bytes, row groups or record batches; `work` in bytes of text, about."""

    source: Source
    start: int
    stop: int
    work: int


def chunks_of(sources: list[Source], reading: Reading) -> list[Chunk]:
    """Chunks of all sources, in order; a source that is empty or broken has one, so that its reader reports it.

    Raises InputError for a column that is missing or holds no text.
    """
    step = max(_CHUNK_BYTES, -(-sum(source.bytes for source in sources) // _MAX_CHUNKS))
    return [chunk for source in sources for chunk in _chunks(source, reading, step) or [Chunk(source, 0, 0, 0)]]


def _chunks(source: Source, reading: Reading, step: int) -> list[Chunk]:
    size = source.bytes
    in_lines = source.kind == LINES or (source.kind == TEXT and reading.split_blank_lines)
    if in_lines and not source.compression:
        starts = range(0, size, step)
        return [Chunk(source, start, min(start + step, size), min(step, size - start)) for start in starts]
    if source.kind in (PARQUET, ARROW):
        return list(_grouped(source, columns.sizes_of(source, reading.chat), step))
    return [Chunk(source, 0, size, size * _RATIOS.get(source.compression, 1))]


def _grouped(source: Source, sizes: list[int], step: int) -> Iterator[Chunk]:
    """Row groups or record batches, as many in a chunk as add up to `step` bytes."""
    start = work = 0
    for number, size in enumerate(sizes, start=1):
        work += size
        if work >= step or number == len(sizes):
            yield Chunk(source, start, number, work)
            start, work = number, 0


def shares(sizes: list[int], ranks: int) -> list[list[int]]:
    """Numbers of the tasks of each rank: from the largest on, each goes to the rank with the least work."""
    owned: list[list[int]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        rank = load.index(min(load))
        owned[rank].append(number)
        load[rank] += sizes[number]
    return owned
