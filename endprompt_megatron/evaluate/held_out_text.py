"""Held-out text as one stream of token ids: a plain text file, or a prepared indexed dataset."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.tokenizer import Tokenizer

READ_AT_MOST = 32 * 2**20  # bytes of text, or tokens: far more than a measurement uses, little enough to tokenise

_INDEX_MAGIC = b"MMIDIDX\x00\x00"  # the first bytes of every Megatron .idx


@dataclass(frozen=True)
class HeldOut:
    """Token ids and where they come from."""

    tokens: np.ndarray  # int64 [n]
    source: str
    sha256: str  # of the ids: two results with equal checksums measured the same text

    def describe(self) -> dict:
        """For results.json."""
        return {"source": self.source, "tokens": len(self.tokens), "sha256": self.sha256}


def held_out(source: Path | str, tokenizer: Tokenizer) -> HeldOut:
    """Read `source`: a UTF-8 text file, or the PREFIX of PREFIX.bin and PREFIX.idx from prepare_data.py.

    A prefix's ids are taken as they are, so they must come from the same tokenizer.  Raises InputError.
    """
    path = Path(source)
    prepared = path.with_name(path.name + ".idx").is_file()
    tokens = _indexed(path) if prepared else _plain(path, tokenizer)
    return HeldOut(tokens, str(path), hashlib.sha256(tokens.tobytes()).hexdigest())


def _plain(path: Path, tokenizer: Tokenizer) -> np.ndarray:
    if path.is_dir() or not path.exists():
        found = "is a directory" if path.is_dir() else "no such file"
        raise InputError(f"--text {path}: {found}; give a plain text file, or the PREFIX of a prepared dataset")
    try:
        with open(path, "rb") as file:
            raw = file.read(READ_AT_MOST)
        # The cut at READ_AT_MOST may fall inside a character.
        text = raw.decode("utf-8") if len(raw) < READ_AT_MOST else raw.decode("utf-8", errors="ignore")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--text {path}: cannot be read as UTF-8 text ({error})") from None
    if not text.strip():
        raise InputError(f"--text {path}: holds no text; give a plain text file that the training has not seen")
    return np.asarray(tokenizer.encode(text), dtype=np.int64)


def _indexed(path: Path) -> np.ndarray:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    if not path.with_name(path.name + ".bin").is_file():
        raise InputError(f"--text {path}: {path.name}.idx is there and {path.name}.bin is not; prepare the text again")
    # Megatron would raise as well, and then once more from a destructor, past every except clause.
    with open(path.with_name(path.name + ".idx"), "rb") as file:
        if file.read(len(_INDEX_MAGIC)) != _INDEX_MAGIC:
            raise InputError(f"--text {path}: not a readable indexed dataset ({path.name}.idx); prepare it again")
    try:
        dataset = IndexedDataset(str(path))
        chunks, total = [], 0
        for index in range(len(dataset)):
            chunks.append(np.asarray(dataset[index], dtype=np.int64))
            total += len(chunks[-1])
            if total >= READ_AT_MOST:
                break
    except Exception as error:  # Megatron asserts on a broken header, numpy raises ValueError on a short file
        raise InputError(f"--text {path}: not a readable indexed dataset ({error}); prepare it again") from None
    if not total:
        raise InputError(f"--text {path}: holds no tokens; prepare a text that the training has not seen")
    return np.concatenate(chunks)


def windows(tokens: np.ndarray, length: int, count: int) -> np.ndarray:
    """`count` stretches of `length` tokens that do not overlap, spread evenly over the text.  int64 [count, length].

    Raises InputError if the text is too short.
    """
    fits = len(tokens) // length
    if fits == 0:
        raise InputError(f"--lengths {length}: the held-out text has only {len(tokens)} tokens; give a longer --text")
    if fits < count:
        raise InputError(
            f"--windows {count}: the held-out text has {len(tokens)} tokens, enough for {fits} of {length}; "
            f"use --windows {fits} or give a longer --text"
        )
    slot = len(tokens) / count  # each window stands in the middle of its share of the text
    starts = [int((index + 0.5) * slot - length / 2) for index in range(count)]
    return np.stack([tokens[start : start + length] for start in starts])
