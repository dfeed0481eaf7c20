"""The header of a safetensors file: its length, then JSON with the place of every tensor; raw bytes follow.

The one reader and writer of that header.  No torch, no safetensors: the library gives no places in the file.
"""

import json
import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from endprompt_megatron.common.units import format_bytes

_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: its dtype as the format calls it ("BF16"), and where its bytes begin and end."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.begin


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a file by name.  Raises ValueError if it is cut short or not a safetensors file, and OSError."""
    with open(path, "rb") as file:
        held = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else held
        if 8 + length > held:
            raise ValueError(f"cut short at {format_bytes(held)}")
        try:
            header = json.loads(file.read(length))
            entries = {}
            for name, said in header.items():
                if name != "__metadata__":
                    begin, end = said["data_offsets"]
                    entries[name] = Entry(said["dtype"], tuple(said["shape"]), 8 + length + begin, 8 + length + end)
            end = max((entry.end for entry in entries.values()), default=8 + length)
            for name, entry in entries.items():
                count = math.prod(entry.shape) * _BYTES.get(entry.dtype, 0)
                if count and entry.bytes != count:
                    raise ValueError(f"{name} has {entry.bytes} bytes, its shape takes {count}")
        except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError):
            raise ValueError("its header cannot be read") from None
    if held != end:
        raise ValueError(f"{held} bytes, its header says {end}")
    return entries


def header_of(tensors: Iterable[tuple[str, tuple[int, ...], int]], code: str) -> bytes:
    """Length and header of a file with these (name, shape, bytes) one after the other, all of the dtype `code`."""
    header, position = {"__metadata__": {"format": "pt"}}, 0
    for name, shape, count in tensors:
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [position, position + count]}
        position += count
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    return struct.pack("<Q", len(text)) + text
