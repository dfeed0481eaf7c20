"""Which documents are kept: by their length, once each, and apart from those held out.

What a text is, is its 128-bit BLAKE2b.  Whether a document is held out is a function of that and the seed alone, so
two copies of a text never stand on both sides; of copies, the first in the order of the input stays.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from endprompt_megatron.common.errors import InputError

DIGEST_BYTES = 16
_TOGETHER = 8 << 20  # digests that are sorted at once, about 50 bytes each


@dataclass(frozen=True)
class Filters:
    """`min_tokens` and `max_tokens` count what is stored, BOS and EOS included; `held_out` is a share of documents."""

    min_tokens: int = 0
    max_tokens: int | None = None
    dedup: bool = False
    held_out: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises InputError for what cannot be meant."""
        if self.min_tokens < 0:
            raise InputError(f"--min-tokens {self.min_tokens}: should be at least 0")
        if self.max_tokens is not None and self.max_tokens < max(self.min_tokens, 1):
            raise InputError(f"--max-tokens {self.max_tokens}: should be at least {max(self.min_tokens, 1)}")
        if not 0 <= self.held_out < 1:
            raise InputError(f"--held-out {self.held_out}: a share of the documents, at least 0 and below 1")

    @property
    def digests(self) -> bool:
        """Whether anything depends on what a text is."""
        return self.dedup or self.held_out > 0

    def is_held_out(self, digest: bytes) -> bool:
        """Whether a text with this digest is held out."""
        drawn = hashlib.blake2b(digest, digest_size=8, key=str(self.seed).encode()).digest()
        return int.from_bytes(drawn, "little") < self.held_out * 2**64


def digest_of(text: str) -> bytes:
    """What tells one text from another."""
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest()


def first_of_each(files: list[Path]) -> np.ndarray:
    """Whether each document is the first with its digest.  Shape (documents,), bool; `files` hold digests, in order.

    All digests are gone through a few times rather than held: at most 8 million at once.
    """
    counts = [file.stat().st_size // DIGEST_BYTES for file in files]
    first = np.ones(sum(counts), dtype=bool)
    groups = 1
    while len(first) > groups * _TOGETHER:
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
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: of equal ones the earlier stays before the later
    keys = keys[order]
    copies = (keys[1:] == keys[:-1]).all(axis=1)
    first[numbers[order[1:][copies]]] = False


def histogram(lengths: np.ndarray) -> list[dict[str, int]]:
    """Documents and tokens by length in powers of two: from 1 to 1 token, 2 to 3, 4 to 7 and so on."""
    if not len(lengths):
        return []
    # frexp of a whole number is exact: its exponent is how many bits it has.
    bits = np.frexp(lengths.astype(np.float64))[1] - 1
    documents = np.bincount(bits)
    tokens = np.bincount(bits, weights=lengths)
    return [
        {"from": 2**n, "to": 2 ** (n + 1) - 1, "documents": int(documents[n]), "tokens": int(tokens[n])}
        for n in range(len(documents))
        if documents[n]
    ]
