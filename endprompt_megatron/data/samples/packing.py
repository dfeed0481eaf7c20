"""Which piece of which document stands in which row: the index behind `data.packing: documents`.

A document, or each piece of a longer one, is a sample of its own; samples are packed into rows of the physical
length by best-fit decreasing.  Every epoch shuffles the pieces and draws their prompts anew, packs window after
window of them, and shuffles the rows.  All of it is pure in (lengths of the documents, Packing, epoch): how many
ranks read the rows changes nothing.  numpy only; packed.py reads tokens by this index.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.files import read_json, replacing, write_json
from endprompt_megatron.method.random_streams import generator

WINDOW = 1 << 20  # pieces that are packed together: whatever the size of the corpus, a window takes a second
SAMPLE = np.dtype([("document", np.int32), ("piece", np.int32), ("prompt", np.int32)])

# Streams of random_streams.generator, beyond those of a sample; the index is the epoch.
_PIECE_ORDER, _PROMPT_CHOICE, _ROW_ORDER = 16, 17, 18
_FORMAT = 1  # of the cache; another number for another packing


@dataclass(frozen=True)
class Packing:
    """What rows follow from, besides the documents' lengths.  All but `seed` in tokens.

    piece_len: the longest context of a sample; shortest: the shortest one, what is shorter is left out.
    prompt_lens: of each prompt, (0,) where there is none.  A sample is padded to a multiple of `align`.
    """

    row_len: int
    piece_len: int
    shortest: int
    prompt_lens: tuple[int, ...]
    align: int
    seed: int
    window: int = WINDOW

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.piece_len <= self.row_len - max(self.prompt_lens):
            raise ValueError(f"pieces of {self.shortest} to {self.piece_len} tokens in rows of {self.row_len}")
        if self.row_len % self.align:
            raise ValueError(f"rows of {self.row_len} tokens are not a multiple of {self.align}")


@dataclass(frozen=True)
class Counts:
    """What an epoch's rows hold.  Tokens of the corpus are either `context_tokens` or `left_out`."""

    rows: int
    samples: int
    context_tokens: int
    prompt_tokens: int
    left_out: int  # in pieces and documents that are too short for a sample
    left_out_pieces: int

    def efficiency(self, row_len: int) -> float:
        """Real tokens, context and prompt, as a share of the rows' tokens."""
        return (self.context_tokens + self.prompt_tokens) / (self.rows * row_len) if self.rows else 0.0


@dataclass(frozen=True)
class Epoch:
    """Row r holds samples[starts[r]:starts[r + 1]], one behind the other.  `samples` [n] SAMPLE, `starts` int64."""

    samples: np.ndarray
    starts: np.ndarray
    counts: Counts


def piece_size(document_len: int, piece: int, packing: Packing) -> int:
    """Context tokens of a document's piece; it begins at piece * piece_len."""
    return min(packing.piece_len, document_len - piece * packing.piece_len)


def piece_sizes(document_lens: np.ndarray, pieces: np.ndarray, packing: Packing) -> np.ndarray:
    """The same for many pieces at once, int64."""
    return np.minimum(packing.piece_len, document_lens.astype(np.int64) - pieces * np.int64(packing.piece_len))


def pack_epoch(lengths: np.ndarray, packing: Packing, epoch: int) -> Epoch:
    """Pack all documents of these `lengths` [documents], in tokens, once."""
    document, piece, size, left_out = _pieces(np.asarray(lengths), packing)
    prompt_lens = np.array(packing.prompt_lens, dtype=np.int32)
    prompt = np.zeros(len(size), dtype=np.int32)
    if len(prompt_lens) > 1:
        draw = generator(packing.seed, epoch, _PROMPT_CHOICE)
        prompt = draw.integers(len(prompt_lens), size=len(size), dtype=np.int32)
    length = size + prompt_lens[prompt]
    counts = (int(size.sum(dtype=np.int64)), int(prompt_lens[prompt].sum(dtype=np.int64)))
    length = -(-length // packing.align) * packing.align

    order = generator(packing.seed, epoch, _PIECE_ORDER).permutation(len(length)).astype(np.int32)
    row = np.empty(len(order), dtype=np.int32)  # of the pieces in their order
    rows = 0
    for start in range(0, len(order), packing.window):
        found, count = best_fit(length[order[start : start + packing.window]], packing.row_len)
        row[start : start + packing.window] = found + rows
        rows += count
    row = generator(packing.seed, epoch, _ROW_ORDER).permutation(rows).astype(np.int32)[row]
    chosen = order[np.argsort(row, kind="stable")]
    samples = np.empty(len(chosen), dtype=SAMPLE)
    samples["document"], samples["piece"], samples["prompt"] = document[chosen], piece[chosen], prompt[chosen]
    starts = np.concatenate(([0], np.cumsum(np.bincount(row, minlength=rows), dtype=np.int64)))
    return Epoch(samples, starts, Counts(rows, len(samples), *counts, *left_out))


def _pieces(lengths: np.ndarray, packing: Packing) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, int]]:
    """Document, number within it and context tokens of every piece, int32 each; tokens and pieces left out."""
    full, rest = np.divmod(lengths.astype(np.int64), packing.piece_len)
    kept = rest >= packing.shortest
    count = full + kept
    document = np.repeat(np.arange(len(lengths), dtype=np.int32), count)
    first = np.cumsum(count) - count
    piece = (np.arange(len(document)) - first[document]).astype(np.int32)
    size = np.where(piece < full[document], packing.piece_len, rest[document]).astype(np.int32)
    short = rest[~kept & (rest > 0)]
    return document, piece, size, (int(short.sum()), len(short))


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Best-fit decreasing: the row of each item, int32 [n], and the number of rows.

    lengths [n], each in 1..capacity.  From the longest item to the shortest, each goes to the row in which it leaves
    the least space, or to a new row where none has enough.  Items of one length are placed together: the row with the
    least sufficient space takes as many of them as it holds, since each makes it fit the next better.  So the work
    grows with the number of different lengths.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int32), kind="stable")
    ordered = lengths[order]
    edges = np.concatenate(([0], np.flatnonzero(np.diff(ordered)) + 1, [len(ordered)]))
    found = np.empty(len(order), dtype=np.int32)
    free_rows: dict[int, list[np.ndarray]] = {}  # rows by the space that is left in them
    present = 0  # bit n: some row has n tokens of space
    rows = 0
    for first, last in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        size = int(ordered[first]) if last > first else 0
        while first < last:
            fitting = present >> size
            if fitting:
                space = size + (fitting & -fitting).bit_length() - 1
                groups = free_rows.pop(space)
                present ^= 1 << space
                free = groups[0] if len(groups) == 1 else np.concatenate(groups)
            else:
                space = capacity
                needed = -(-(last - first) // (space // size))
                free = np.arange(rows, rows + needed, dtype=np.int32)
                rows += needed
            each = space // size
            taken = min(last - first, each * len(free))
            full, extra = divmod(taken, each)
            found[order[first : first + taken]] = np.repeat(free[: full + bool(extra)], each)[:taken]
            first += taken
            left = (
                (space - each * size, free[:full]),
                (space - extra * size, free[full : full + 1] if extra else free[:0]),
                (space, free[full + bool(extra) :]),
            )
            for space_left, which in left:
                if space_left and len(which):
                    free_rows.setdefault(space_left, []).append(which)
                    present |= 1 << space_left
    return found, rows


# The cache: an epoch is packed once, by whoever comes first, and memory-mapped by the others.


def cached_epoch(lengths: np.ndarray, packing: Packing, epoch: int, cache: Path, source: dict) -> Epoch:
    """`pack_epoch`, kept in the directory `cache`.  `source` (JSON) names the documents: their digest and range.

    The description is written last, so an epoch that has one is complete; one that was damaged since is packed again.
    """
    job = {"format": _FORMAT, **source, **asdict(packing), "epoch": epoch}
    digest = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:32]
    paths = [cache / f"packed-{digest}.{name}" for name in ("json", "samples.npy", "starts.npy")]
    found = _read(*paths)
    if found is None:
        packed = pack_epoch(lengths, packing, epoch)
        cache.mkdir(parents=True, exist_ok=True)
        for path, array in zip(paths[1:], (packed.samples, packed.starts), strict=True):
            with replacing(path) as file:
                np.save(file, array)
        write_json(paths[0], {**job, "counts": asdict(packed.counts)})
        found = _read(*paths)
        if found is None:
            raise InputError(f"data.cache {cache}: what was just written cannot be read back; choose another directory")
    return found


def _read(description: Path, samples_at: Path, starts_at: Path) -> Epoch | None:
    """None where there is no such epoch, or only a damaged one."""
    try:
        counts = Counts(**read_json(description, "a packed epoch")["counts"])
        samples, starts = (np.asarray(np.load(path, mmap_mode="r")) for path in (samples_at, starts_at))
    except (InputError, OSError, EOFError, ValueError, TypeError, KeyError):
        return None
    if samples.dtype != SAMPLE or len(samples) != counts.samples or len(starts) != counts.rows + 1:
        return None
    return Epoch(samples, starts, counts)
