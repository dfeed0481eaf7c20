"""Which documents are kept: those of the right length, one of each text, apart from those held out.

The 128-bit BLAKE2b of a text identifies it.  Whether a document is held out depends on that digest and the seed alone,
so copies of a text are either all held out or none of them; of copies, the first in the order of the input is kept.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from endprompt_megatron.common.errors import InputError

DIGEST_BYTES = 16
_MAX_SORTED = 8 << 20  # digests that are sorted at once, about 50 bytes each


@dataclass(frozen=True)
class Filters:
    """`min_tokens` and `max_tokens` count what is stored, BOS and EOS included; `held_out` is a share of documents."""

    min_tokens: int = 0
    max_tokens: int | None = None
    dedup: bool = False
    held_out: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises InputError for values that contradict themselves or each other."""
        if self.min_tokens < 0:
            raise InputError(f"--min-tokens {self.min_tokens}: should be at least 0")
        if self.max_tokens is not None and self.max_tokens < max(self.min_tokens, 1):
            raise InputError(f"--max-tokens {self.max_tokens}: should be at least {max(self.min_tokens, 1)}")
        if not 0 <= self.held_out < 1:
            raise InputError(f"--held-out {self.held_out}: a share of the documents, at least 0 and below 1")

    @property
    def digests(self) -> bool:
        """Whether the digest of each text is needed."""
        return self.dedup or self.held_out > 0

    def is_held_out(self, digest: bytes) -> bool:
        """Whether a text with this digest is held out."""
        drawn = hashlib.blake2b(digest, digest_size=8, key=str(self.seed).encode()).digest()
        return int.from_bytes(drawn, "little") < self.held_out * 2**64


def digest_of(text: str) -> bytes:
    """The digest that identifies a text."""
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest()


def first_of_each(files: list[Path]) -> np.ndarray:
    """Whether each document is the first with its digest.  Shape (documents,), bool; `files` hold digests, in order.

    Of many digests, at most 8 million are in memory at once: the files are read several times instead.
    """
    counts = [file.stat().st_size // DIGEST_BYTES for file in files]
    first = np.ones(sum(counts), dtype=bool)
    groups = 1
    while len(first) > groups * _MAX_SORTED:
        groups *= 2
    for group in range(groups):
        keys, numbers, begin = [], [], 0
        for file, count in zip(files, counts, strict=True):
            if count:
                digests = np.fromfile(file, dtype="<u8").reshape(-1, 2)
                mine = np.flatnonzero((digests[:, 0] & np.uint64(groups - 1)) == group)
                keys.append(digests[mine])
                numbers.append(begin + mine)
            begin += count
        if keys:
            _mark_copies(np.concatenate(keys), np.concatenate(numbers), first)
    return first


def _mark_copies(keys: np.ndarray, numbers: np.ndarray, first: np.ndarray) -> None:
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: equal digests stay in the order of the input
    keys = keys[order]
    copies = (keys[1:] == keys[:-1]).all(axis=1)
    first[numbers[order[1:][copies]]] = False


def histogram(lengths: np.ndarray) -> list[dict[str, int]]:
    """Documents and tokens by length in powers of two: from 1 to 1 token, 2 to 3, 4 to 7 and so on."""
    if not len(lengths):
        return []
    # frexp of an integer is exact: its exponent is the number of bits.
    bits = np.frexp(lengths.astype(np.float64))[1] - 1
    documents = np.bincount(bits)
    tokens = np.bincount(bits, weights=lengths)
    return [
        {"from": 2**n, "to": 2 ** (n + 1) - 1, "documents": int(documents[n]), "tokens": int(tokens[n])}
        for n in range(len(documents))
        if documents[n]
    ]
