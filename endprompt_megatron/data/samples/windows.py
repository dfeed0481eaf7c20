"""Which tokens of an indexed dataset make which sample: windows of one size, cut anew and shuffled every epoch.

numpy alone.  An epoch lays the dataset's documents in a drawn order into one stream, cuts that into windows and
draws the order of the windows; both draws depend on (seed, epoch) alone, not on how many samples a run
asks for.  The first epoch is, window for window, that of Megatron's GPTDataset.

What is laid into the stream (`data.document_ends`):

    cross    whole documents: windows cross their ends; at most one window's worth at the end of an epoch is left out
    within   of a document of n tokens, n // size * size consecutive ones, so that every window lies inside one
             document.  In the first epoch they begin with the document's first token; in every later one at a drawn
             offset, so that other tokens are left out
    single   the same of `size` tokens alone: one window a document (for PoSE's content skip)

A sample's window is found by binary search, so an epoch's index is two numbers a document and one a window.  An
index too large to be made at every start is kept in the cache: written under a temporary name, then renamed,
and memory-mapped, so that the ranks of a node share it.
"""

import bisect
import hashlib
import json
from pathlib import Path

import numpy as np

from endprompt_megatron.common.files import replacing
from endprompt_megatron.data.indexed import Index

SMALL = 1 << 20  # numbers; an index up to it is made in memory, in tens of milliseconds
_OPEN = 2  # epochs in memory at a time: a global batch may lie on both sides of an epoch's end
_STRIDE = 0x9E3779B1  # between the seeds of two epochs; odd, so that 2**32 epochs differ


def epoch_seed(seed: int, epoch: int) -> int:
    """The seed of an epoch's draws; the first epoch has the run's own."""
    return (seed + _STRIDE * epoch) % 2**32


class Windows:
    """Windows of `size` tokens of documents `first` .. `stop` of a dataset, of those with at least `min_len` tokens.

    Endless: window `index` is that of place index % count in epoch index // count.  `count` may be 0, and then
    there is none.  `documents` and `tokens` are what windows are cut from in an epoch, `left_out` the tokens of the
    dataset's part that are in no window of it.  `cache` is a directory, None to keep every index in memory.
    """

    def __init__(
        self,
        index: Index,
        size: int,
        seed: int,
        *,
        ends: str = "cross",
        min_len: int = 0,
        first: int = 0,
        stop: int | None = None,
        cache: Path | None = None,
    ) -> None:
        stop = len(index.lengths) if stop is None else stop
        if ends not in ("cross", "within", "single"):
            raise ValueError(f"ends={ends} should be cross, within or single")
        self.size, self.seed, self.ends = size, seed, ends
        self._index, self._cache, self._first, self._stop = index, cache, first, stop
        self._min_len = max(min_len, size if ends != "cross" else 0)
        lengths = index.lengths[first:stop]
        tokens = int(lengths.sum(dtype=np.int64))
        if self._min_len:
            lengths = lengths[lengths >= self._min_len]
        self.documents, self.tokens = len(lengths), int(lengths.sum(dtype=np.int64))
        if ends == "within":
            self.count = int((lengths // size).sum(dtype=np.int64))
        else:
            self.count = len(lengths) if ends == "single" else self.tokens // size
        self.left_out = tokens - self.count * size
        self._open: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def epochs(self, samples: int) -> int:
        """Epochs that so many samples take; the last one may be used in part."""
        return -(-samples // self.count)

    def spans(self, index: int) -> list[tuple[int, int]]:
        """Where window `index` lies in the .bin: (start, stop) in tokens, one for each document that it takes from."""
        epoch, place = divmod(index, self.count)
        shifts, ends, shuffle = self._epoch(epoch)
        begin = int(shuffle[place]) * self.size
        end = begin + self.size
        first = int(ends.searchsorted(begin, side="right"))
        if end <= ends[first]:
            shift = int(shifts[first])
            return [(begin + shift, end + shift)]
        last = int(ends.searchsorted(end, side="left"))
        within = ends[first:last].tolist()
        bounds = zip([begin, *within], [*within, end], shifts[first : last + 1].tolist(), strict=True)
        return [(start + shift, stop + shift) for start, stop, shift in bounds if start < stop]

    def document(self, token: int) -> tuple[int, int, int]:
        """Number, start and length of the document that holds a token of the .bin."""
        itemsize = self._index.dtype.itemsize
        # Not searchsorted: the pointers of an .idx are not aligned, and it would copy all of them.
        number = bisect.bisect_right(self._index.pointers, token * itemsize) - 1
        return number, int(self._index.pointers[number]) // itemsize, int(self._index.lengths[number])

    def prepare(self, samples: int) -> None:
        """Put the indices that so many samples take into the cache, those that belong there."""
        if self._cached():
            for epoch in range(self.epochs(samples)):
                self._load(epoch)

    def _cached(self) -> bool:
        return self._cache is not None and 2 * self.documents + self.count > SMALL

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(shifts, ends, shuffle) of an epoch: see _build."""
        if epoch not in self._open:
            while len(self._open) >= _OPEN:
                self._open.pop(next(iter(self._open)))
            numbers = self._load(epoch) if self._cached() else self._build(epoch)
            self._open[epoch] = tuple(np.split(numbers, (self.documents, 2 * self.documents)))
        return self._open[epoch]

    def _build(self, epoch: int) -> np.ndarray:
        """int64: for each document of the stream, what to add to a place in the stream to get to its token in the .bin;
        where each document ends in the stream; the number of the window at each place of the epoch.
        """
        random = np.random.RandomState(epoch_seed(self.seed, epoch))  # numpy keeps its draws for good
        order = np.arange(self._first, self._stop, dtype=np.int64)
        if self._min_len:
            order = order[self._index.lengths[self._first : self._stop] >= self._min_len]
        random.shuffle(order)
        lengths = self._index.lengths[order].astype(np.int64)
        starts = self._index.pointers[order] // self._index.dtype.itemsize
        shuffle = np.arange(self.count, dtype=np.int64)
        random.shuffle(shuffle)
        if self.ends != "cross":
            used = lengths // self.size * self.size if self.ends == "within" else np.full_like(lengths, self.size)
            if epoch and len(lengths):
                starts += random.randint(0, lengths - used + 1)
            lengths = used
        ends = np.cumsum(lengths)
        return np.concatenate((starts - (ends - lengths), ends, shuffle))

    def _load(self, epoch: int) -> np.ndarray:
        """An epoch's index, memory-mapped out of the cache; made there first if it is missing or incomplete."""
        what = [self._index.digest, self.size, self.seed, self.ends, self._min_len, self._first, self._stop, epoch]
        name = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]
        path = self._cache / f"windows-{name}.i64"
        expected = 8 * (2 * self.documents + self.count)
        if not path.is_file() or path.stat().st_size != expected:
            self._cache.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                self._build(epoch).tofile(file)
        return np.asarray(np.memmap(path, dtype=np.int64, mode="r"))
