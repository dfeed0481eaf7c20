"""Megatron's indexed dataset on disk: PREFIX.bin holds the tokens, PREFIX.idx where each document begins.

PREFIX.json is our manifest of it.  A dataset of conversations has a second one beside it, PREFIX.mask (.bin and .idx,
uint8): 1 for each token of an answer, the token that ends it included, and 0 for every other.

Files are written byte for byte as megatron.core's IndexedDatasetBuilder writes them (a test compares them), so that
worker processes need neither torch nor Megatron; they are read as far as checks before a run need it.
"""

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.files import read_json

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1
_CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}
_BLOCK = 1 << 20  # documents
_TOKEN_DTYPES = ("uint8", "int8", "int16", "int32", "int64", "uint16")

MASK = ".mask"  # what PREFIX of the mask ends with
CHAT = "chat"  # "kind" in the manifest of a dataset of conversations; texts have none


def path_of(prefix: Path | str, suffix: str) -> Path:
    """PREFIX + suffix; a dot in the prefix's own name is kept."""
    return Path(f"{prefix}{suffix}")


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype that Megatron stores tokens of such a vocabulary in."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def write_idx(path: Path, lengths: np.ndarray, dtype: np.dtype) -> None:
    """Write the index of a .bin file whose documents have these `lengths` (tokens), one sequence each."""
    lengths = np.asarray(lengths, dtype=np.int32)
    count = len(lengths)
    with open(path, "wb") as file:
        file.write(_HEADER.pack(_MAGIC, 1, _CODES[dtype.name], count, count + 1))
        # In blocks: of a large corpus, all pointers together would take gigabytes.
        blocks = [slice(start, start + _BLOCK) for start in range(0, count, _BLOCK)]
        for block in blocks:
            file.write(lengths[block].tobytes())
        begin = 0
        for block in blocks:
            ends = begin + np.cumsum(lengths[block], dtype=np.int64)
            file.write(((ends - lengths[block]) * dtype.itemsize).tobytes())
            begin = int(ends[-1])
        for start in range(0, count + 1, _BLOCK):
            file.write(np.arange(start, min(start + _BLOCK, count + 1), dtype=np.int64).tobytes())


@dataclass(frozen=True)
class Index:
    """What an .idx says: `lengths` int32 [sequences] in tokens and `pointers` int64 [sequences] in bytes of the .bin
    (both memory-mapped), the tokens' dtype, a digest of the file.
    """

    lengths: np.ndarray
    pointers: np.ndarray
    dtype: np.dtype
    digest: str


def read_idx(prefix: Path | str) -> Index:
    """Read and check PREFIX.idx against PREFIX.bin.  Raises InputError for a missing, foreign or cut file."""
    idx, bin_ = path_of(prefix, ".idx"), path_of(prefix, ".bin")
    for path in (idx, bin_):
        if not path.is_file():
            raise InputError(f"{path}: no such file; tools/prepare_data.py --out {prefix} makes .bin and .idx")
    # Mapped, not read: the index of a large corpus takes gigabytes, and every rank opens it.
    content = np.memmap(idx, mode="r") if idx.stat().st_size else b""
    if len(content) < _HEADER.size or bytes(content[: len(_MAGIC)]) != _MAGIC:
        raise InputError(f"{idx}: not an index of Megatron's indexed dataset; make it again with tools/prepare_data.py")
    _, version, code, sequences, documents = _HEADER.unpack_from(content)
    name = {code: name for name, code in _CODES.items()}.get(code)
    if version != 1 or name not in _TOKEN_DTYPES:
        raise InputError(f"{idx}: version {version} with dtype code {code} holds no tokens")
    if len(content) < _HEADER.size + 12 * sequences + 8 * documents:
        raise InputError(f"{idx}: cut short; make it again with tools/prepare_data.py")
    lengths = np.frombuffer(content, dtype=np.int32, count=sequences, offset=_HEADER.size)
    pointers = np.frombuffer(content, dtype=np.int64, count=sequences, offset=_HEADER.size + 4 * sequences)
    expected = int(lengths.sum(dtype=np.int64)) * np.dtype(name).itemsize
    if bin_.stat().st_size != expected:
        raise InputError(f"{bin_}: {bin_.stat().st_size} bytes where {idx.name} expects {expected}; make both again")
    return Index(lengths, pointers, np.dtype(name), hashlib.sha256(content).hexdigest())


def read_manifest(prefix: Path | str) -> dict | None:
    """PREFIX.json as tools/prepare_data.py wrote it; None for a dataset made by another tool."""
    path = path_of(prefix, ".json")
    return read_json(path, "a dataset manifest") if path.exists() else None


def read_mask(prefix: Path | str, index: Index) -> np.ndarray:
    """Which tokens of a dataset of conversations are answers, uint8 [tokens], memory-mapped.  Raises InputError."""
    mask = read_idx(f"{prefix}{MASK}")
    if mask.dtype != np.uint8 or not np.array_equal(mask.lengths, index.lengths):
        raise InputError(f"{prefix}{MASK}.idx: does not belong to {path_of(prefix, '.idx').name}; make both again")
    return np.memmap(path_of(prefix, f"{MASK}.bin"), dtype=np.uint8, mode="r")
