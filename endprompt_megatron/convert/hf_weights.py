"""Weights of a Hugging Face directory: read lazily, one tensor at a time, and written the same way.

One file or shards with an index, safetensors or the older pytorch_model.bin.  Writing does not go through the
safetensors library, which wants all tensors of a file in memory: the format is a length, a JSON header and raw bytes.
"""

import itertools
import json
import math
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from endprompt_megatron.checkpoint.tensor_reader import Record, read_into
from endprompt_megatron.common.direct_io import OnceFile, SummedFile
from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.files import read_json, write_json
from endprompt_megatron.convert.bin_files import BinFile
from endprompt_megatron.convert.mapping import EMBEDDING, TIED_DUPLICATE, Piece

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
OLD_SINGLE = "pytorch_model.bin"
OLD_INDEX = "pytorch_model.bin.index.json"
_PART_BYTES = 256 << 20
_CODES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_CODE_OF = {name: code for code, name in _CODES.items()}


class HfWeights:
    """The weights of a directory.  Headers are read at once, tensors when they are asked for.

    Where there are both safetensors and pytorch_model.bin, the first.  `once`: nobody asks for the same part again.
    """

    def __init__(self, directory: Path, *, once: bool = False):
        """Raises InputError if a file is missing, truncated, or does not hold what the index says."""
        self.directory, self.once = directory, once
        self.files = {}  # tensor name -> open file
        self.entries = {}  # tensor name -> (file name, dtype code, shape)
        self.records = {}  # tensor name -> (open file, where in it), for safetensors
        for name in (INDEX, SINGLE, OLD_INDEX, OLD_SINGLE):
            if (directory / name).is_file():
                if name in (INDEX, OLD_INDEX):
                    self._open_all(directory / name)
                else:
                    self._open(name)
                return
        raise InputError(
            f"{directory}: no {SINGLE}, no {INDEX} and no {OLD_SINGLE}; weights in other formats: load them with "
            "transformers and save_pretrained"
        )

    def _open_all(self, path: Path) -> None:
        index = read_json(path, "an index of weights").get("weight_map")
        if not isinstance(index, dict) or not index:
            raise InputError(f"{path}: has no weight_map; download the index again")
        for name in sorted(set(index.values())):
            self._open(name)
        for tensor, name in index.items():
            if self.entries.get(tensor, ("",))[0] != name:
                raise InputError(f"{path}: says that {tensor} is in {name}, but it is not there")

    def _open(self, name: str) -> None:
        from safetensors import SafetensorError, safe_open

        path = self.directory / name
        if not path.is_file():
            raise InputError(f"{path}: no such file, though the index names it; download this shard")
        try:
            file = BinFile(path) if path.suffix == ".bin" else safe_open(path, framework="pt")
            for tensor in file.keys():  # noqa: SIM118  (a safetensors file is not a mapping)
                if tensor in self.entries:
                    raise InputError(
                        f"{path}: {tensor} is in {self.entries[tensor][0]} as well; remove one of the files"
                    )
                part = file.get_slice(tensor)
                self.files[tensor] = file
                self.entries[tensor] = (name, str(part.get_dtype()), tuple(part.get_shape()))
            if path.suffix != ".bin":
                self._find_records(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read as safetensors ({_first_line(error)}); truncated?") from error

    def _find_records(self, path: Path) -> None:
        """Where the tensors lie in a safetensors file, which the library that has checked it does not say."""
        file = OnceFile(path) if self.once else open(path, "rb", buffering=0)  # noqa: SIM115  (as long as this object)
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        for tensor, entry in header.items():
            if entry.get("dtype") in _CODES:
                dtype = getattr(torch, _CODES[entry["dtype"]])
                begin = 8 + length + entry["data_offsets"][0]
                self.records[tensor] = file, Record(begin, tuple(entry["shape"]), dtype)

    def check(self, pieces: list[Piece], tied: bool) -> dict[str, str]:
        """Compare with what the config promises; returns the dtypes ("bfloat16"), each with a tensor that has it.

        Raises InputError for a missing, unexpected, quantised or wrongly shaped tensor.  Ignored are old
        checkpoints' rotary buffers and, in a tied model, a second copy of the embedding.
        """
        expected = {name: sizes for piece in pieces for name, sizes in piece.hf}
        for tensor, (name, code, sizes) in self.entries.items():
            where = f"{self.directory / name}: {tensor}"
            if tensor.endswith("rotary_emb.inv_freq"):
                continue
            if tied and tensor == TIED_DUPLICATE:
                if EMBEDDING in self.entries and not torch.equal(self.get(tensor), self.get(EMBEDDING)):
                    raise InputError(f"{where} differs from {EMBEDDING}; set tie_word_embeddings=false in config.json")
                continue
            if tensor not in expected:
                raise InputError(f"{where} is not a tensor of the model in config.json; is it another architecture?")
            if code not in _CODES:
                raise InputError(f"{where} has dtype {code}: quantised weights are not supported; use BF16, F16 or F32")
            if sizes != expected[tensor]:
                raise InputError(f"{where} has shape {list(sizes)}; config.json says {list(expected[tensor])}")
        for tensor in expected:
            if tensor not in self.entries:
                raise InputError(f"{self.directory}: tensor {tensor} is missing; is the download complete?")
        found = {}
        for tensor in expected:
            found.setdefault(_CODES[self.entries[tensor][1]], tensor)
        return found

    def get(self, tensor: str) -> torch.Tensor:
        """One tensor, read now."""
        return self.files[tensor].get_tensor(tensor)

    def bytes_of(self, tensor: str) -> int:
        """Bytes of a tensor in its file."""
        _, code, sizes = self.entries[tensor]
        return math.prod(sizes) * _BYTES.get(code, 0)

    def read_into(self, target: torch.Tensor, tensor: str, offset: tuple[int, ...]) -> None:
        """Fill `target` with the part of a tensor that starts at `offset`, cast to the target's dtype.

        From safetensors without a copy in between.  Raises InputError if the file has been cut meanwhile.
        """
        if tensor not in self.records:
            box = tuple(slice(begin, begin + size) for begin, size in zip(offset, target.shape, strict=True))
            target.copy_(self.part(tensor, box))
            return
        file, record = self.records[tensor]
        try:
            read_into(target, file, record, offset)
        except ValueError as error:
            raise InputError(f"{self.directory / self.entries[tensor][0]}: {tensor}: {error}") from None

    def expect(self, tensor: str, first: int, count: int) -> None:
        """Let the disk begin with rows that are asked for next: of queries, keys and values a few here, a few there."""
        if tensor in self.records and not self.once and hasattr(os, "posix_fadvise"):
            file, record = self.records[tensor]
            row = math.prod(record.shape[1:]) * record.dtype.itemsize
            os.posix_fadvise(file.fileno(), record.begin + first * row, count * row, os.POSIX_FADV_WILLNEED)

    def part(self, tensor: str, box: tuple[slice, ...]) -> torch.Tensor:
        """A part of one tensor, a slice an axis; no more than that is read."""
        return self.files[tensor].get_slice(tensor)[box]


@dataclass(frozen=True)
class Shard:
    """A weight file: its name, and the tensors in it with shapes and bytes, in the order in which they lie there."""

    name: str
    tensors: tuple[tuple[str, tuple[int, ...], int], ...]

    @property
    def bytes(self) -> int:
        return sum(count for _, _, count in self.tensors)


def shards_of(pieces: list[Piece], dtype: str, max_shard_bytes: int) -> list[Shard]:
    """The files that transformers' save_pretrained makes of the tensors of `pieces`: one, or several."""
    size = getattr(torch, dtype).itemsize
    tensors = [(name, sizes, size * math.prod(sizes)) for piece in pieces for name, sizes in piece.hf]
    parts = _shards(sorted(tensors, key=_natural), max_shard_bytes)
    names = [SINGLE]
    if len(parts) > 1:
        names = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    # The safetensors library lays tensors of one dtype out by name.
    return [Shard(name, tuple(sorted(part))) for name, part in zip(names, parts, strict=True)]


@dataclass(frozen=True)
class Part:
    """Tensors `first` to `last` - 1 of a weight file: what one worker writes of it.  The header goes with tensor 0."""

    shard: Shard
    first: int
    last: int

    @property
    def bytes(self) -> int:
        return sum(count for _, _, count in self.shard.tensors[self.first : self.last])


def whole(shard: Shard) -> Part:
    """A file as one part."""
    return Part(shard, 0, len(shard.tensors))


def parts_of(shard: Shard) -> list[Part]:
    """A file in parts of at least _PART_BYTES, cut between layers: a few large files keep many workers busy."""
    layers = [name.split("layers.")[-1].split(".")[0] for name, _, _ in shard.tensors]
    cuts, held = [0], 0
    for index, (_, _, count) in enumerate(shard.tensors):
        if held >= _PART_BYTES and layers[index] != layers[index - 1]:
            cuts.append(index)
            held = 0
        held += count
    return [Part(shard, first, last) for first, last in itertools.pairwise([*cuts, len(shard.tensors)])]


def write_part(directory: Path, part: Part, dtype: str, read: Callable[[str], Iterator[torch.Tensor]]) -> dict:
    """Write a part of a file where it belongs; returns the file's name, where the part begins, its bytes and CRC-32.

    `read` gives a tensor's rows, a few at a time, in order.  Raises OSError if the disk refuses.
    """
    shard = part.shard
    head = _header(shard, dtype)
    begin = len(head) + sum(count for _, _, count in shard.tensors[: part.first]) if part.first else 0
    with SummedFile(directory / shard.name, begin) as file:
        for data in itertools.chain([] if part.first else [head], _bytes_of(part, read)):
            file.write(data)
    return {"path": shard.name, "begin": begin, "bytes": file.count, "crc32": file.crc32}


def _bytes_of(part: Part, read: Callable[[str], Iterator[torch.Tensor]]) -> Iterator[memoryview]:
    for name, _, count in part.shard.tensors[part.first : part.last]:
        for rows in read(name):
            data = rows.contiguous().view(torch.uint8).numpy().reshape(-1).data
            count -= len(data)
            yield data
        if count:
            raise ValueError(f"{name}: {count} bytes were not given")


def write_index(directory: Path, shards: list[Shard], dtype: str) -> None:
    """The index of several files, as transformers writes it."""
    total = sum(shard.bytes for shard in shards)
    placed = {name: shard.name for shard in shards for name, _, _ in shard.tensors}
    metadata = {"total_parameters": total // getattr(torch, dtype).itemsize, "total_size": total}
    write_json(directory / INDEX, {"metadata": metadata, "weight_map": dict(sorted(placed.items()))})


def _natural(tensor: tuple) -> list[tuple[int, object]]:
    """The order in which transformers 5 fills shards: by name, numbers as numbers."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in tensor[0].split(".")]


def _shards(tensors: list[tuple], max_bytes: int) -> list[list[tuple]]:
    """Fill shards in order, as huggingface_hub does: a tensor larger than a shard gets one of its own."""
    shards, current, held = [], [], 0
    for tensor in tensors:
        count = tensor[2]
        if count > max_bytes:
            shards.append([tensor])
            continue
        if held + count > max_bytes:
            shards.append(current)
            current, held = [], 0
        current.append(tensor)
        held += count
    return [*shards, current] if current else shards


def _header(shard: Shard, dtype: str) -> bytes:
    """Length and header of a safetensors file."""
    header, position = {"__metadata__": {"format": "pt"}}, 0
    for name, sizes, count in shard.tensors:
        header[name] = {"dtype": _CODE_OF[dtype], "shape": list(sizes), "data_offsets": [position, position + count]}
        position += count
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    return struct.pack("<Q", len(text)) + text


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
