"""A slice of a tensor that torch.save wrote somewhere in a file, read straight to where it belongs.

torch.load reads a complete stored tensor into memory of its own, and a checkpoint saved without tensor parallelism
holds some of over 2 GB.  Here only the bytes that are asked for are read, and most of them once.
"""

import io
import math
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from endprompt_megatron.common.errors import InputError

_BLOCK = 16 << 20
_STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ByteStorage": torch.uint8,
}


class Scratch:
    """Memory used again for one shard after the other: to find fresh memory takes longer than to fill it."""

    def __init__(self) -> None:
        self._memory = bytearray()

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of any content with a storage of just its size, good until the next is asked for."""
        count = math.prod(shape)
        if len(self._memory) < count * dtype.itemsize:
            self._memory = bytearray(count * dtype.itemsize)
        if not count:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._memory, dtype=dtype, count=count).view(shape)


@dataclass(frozen=True)
class Record:
    """Where in a file the elements of a tensor begin; they lie there row by row."""

    begin: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def find(file: io.RawIOBase, begin: int, length: int) -> Record | None:
    """The tensor in the torch.save archive at `begin`; None if it is stored in another way than row by row.

    Raises ValueError or zipfile.BadZipFile if the archive is damaged.
    """
    view = _View(file, begin, length)
    with zipfile.ZipFile(view) as archive:
        entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
    if "data.pkl" not in entries or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
        return None
    # Not by the archive's own reading: that compares a CRC-32 which need not have been written.
    view.seek(_data_of(view, entries["data.pkl"]))
    pickled = io.BytesIO(view.read(entries["data.pkl"].file_size))
    try:
        stored = _Layout(pickled).load()
    except _OtherWay:
        return None
    if not isinstance(stored, _Plain):
        return None
    _, dtype, key, *_ = stored.storage
    shape, offset = stored.shape, stored.offset
    count = math.prod(shape)
    by_rows = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    if stored.stride != by_rows or f"data/{key}" not in entries:
        return None
    data = entries[f"data/{key}"]
    if data.file_size < (offset + count) * dtype.itemsize:
        raise ValueError("a stored tensor is cut short")
    return Record(begin + _data_of(view, data) + offset * dtype.itemsize, shape, dtype)


def _data_of(view: io.RawIOBase, entry: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin: behind its own header, whose name and extra field vary in length."""
    view.seek(entry.header_offset)
    header = view.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise ValueError("a stored tensor has no header")
    return entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))


class _View(io.RawIOBase):
    """A range of a file, as a file."""

    def __init__(self, file: io.RawIOBase, begin: int, length: int):
        self.file, self.begin, self.length, self.at = file, begin, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.length}[whence])
        return self.at

    def readinto(self, buffer: memoryview) -> int:
        self.file.seek(self.begin + self.at)
        count = self.file.readinto(memoryview(buffer)[: max(0, self.length - self.at)])
        self.at += count
        return count


class _Plain(NamedTuple):
    """What a pickled tensor is made of."""

    storage: tuple[Any, ...]
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _OtherWay(Exception):
    """Not a plain tensor."""


class _Layout(pickle.Unpickler):
    """What a pickled tensor says of its storage and strides; nothing else in the pickle is called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: _Plain(storage, offset, tuple(size), tuple(stride))
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise _OtherWay

    def persistent_load(self, pid: Any) -> Any:
        return pid


def refuse_overflow(cast: torch.Tensor, stored: torch.dtype, source: Callable[[], torch.Tensor], where: str) -> None:
    """Raise InputError, naming `where`, if a cast from dtype `stored` made finite numbers infinite.

    `source` reads what was cast, as it is stored; it is asked for only where something is infinite.
    """
    if cast.dtype == stored or torch.finfo(cast.dtype).max >= torch.finfo(stored).max or not torch.isinf(cast).any():
        return
    exact = source().reshape(cast.shape)
    lost = torch.isinf(cast) & torch.isfinite(exact)
    if lost.any():
        name = str(cast.dtype).removeprefix("torch.")
        raise InputError(
            f"{where}: {float(exact[lost].abs().max()):g} does not fit {name}, whose largest number is "
            f"{torch.finfo(cast.dtype).max:g}; use {'bfloat16 or ' if cast.dtype == torch.float16 else ''}float32"
        )


def read_into(target: torch.Tensor, file: io.RawIOBase, record: Record, offset: tuple[int, ...]) -> None:
    """Fill `target` with the slice of the record that starts at `offset`, cast to the target's dtype.

    Raises ValueError if the file ends before.
    """
    if target.dim() == 0:
        target, offset, record = target.view(1), (0,), Record(record.begin, (1,), record.dtype)
    _fill(target, file, record.begin, record.shape, offset, record.dtype)


def _fill(
    target: torch.Tensor,
    file: io.RawIOBase,
    begin: int,
    shape: tuple[int, ...],
    offset: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    row = math.prod(shape[1:]) * dtype.itemsize
    if tuple(target.shape[1:]) == shape[1:] and target.dtype == dtype and target.is_contiguous():
        _read(target, file, begin + offset[0] * row)
        return
    if len(shape) > 1 and row > _BLOCK:
        for index, row_of_target in enumerate(target):
            _fill(row_of_target, file, begin + (offset[0] + index) * row, shape[1:], offset[1:], dtype)
        return
    # Rows are read completely: a few columns of each would be as many calls as rows.
    step = max(1, _BLOCK // row)
    buffer = torch.empty((min(step, len(target)), *shape[1:]), dtype=dtype)
    for at in range(0, len(target), step):
        rows = target[at : at + step]
        stored = buffer[: len(rows)]
        _read(stored, file, begin + (offset[0] + at) * row)
        for axis in range(1, len(shape)):
            stored = stored.narrow(axis, offset[axis], rows.shape[axis])
        rows.copy_(stored)


def _read(target: torch.Tensor, file: io.RawIOBase, begin: int) -> None:
    """Fill a contiguous tensor with the bytes of the file from `begin` on."""
    file.seek(begin)
    left = memoryview(target.view(-1).view(torch.uint8).numpy())
    while left:
        count = file.readinto(left)
        if not count:
            raise ValueError("the file ends before a stored tensor does")
        left = left[count:]
