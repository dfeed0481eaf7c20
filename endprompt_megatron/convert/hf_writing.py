"""Weights of a Hugging Face directory, written: the files that save_pretrained would write, a few rows at a time.

Writing does not go through the safetensors library, which wants all tensors of a file in memory.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from endprompt_megatron.common.direct_io import ChecksummedFile
from endprompt_megatron.common.files import write_json
from endprompt_megatron.convert.hf_weights import CODE_OF, INDEX, SINGLE
from endprompt_megatron.convert.mapping import MappedTensor
from endprompt_megatron.convert.safetensors_header import header_of

_CHUNK_BYTES = 256 << 20


@dataclass(frozen=True)
class WeightFile:
    """A file to write: its name, and the tensors in it with shapes and bytes, in the order in which they lie there."""

    name: str
    tensors: tuple[tuple[str, tuple[int, ...], int], ...]

    @property
    def bytes(self) -> int:
        return sum(count for _, _, count in self.tensors)


def files_of(mapped: list[MappedTensor], dtype: str, max_bytes: int) -> list[WeightFile]:
    """The files that transformers' save_pretrained makes of a model's tensors: one, or several."""
    size = getattr(torch, dtype).itemsize
    tensors = [(name, sizes, size * math.prod(sizes)) for tensor in mapped for name, sizes in tensor.hf]
    groups = _in_files(sorted(tensors, key=_natural), max_bytes)
    names = [SINGLE]
    if len(groups) > 1:
        names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    # The safetensors library lays tensors of one dtype out by name.
    return [WeightFile(name, tuple(sorted(group))) for name, group in zip(names, groups, strict=True)]


@dataclass(frozen=True)
class FileChunk:
    """Tensors `first` to `last` - 1 of a weight file: what one worker writes of it.  The header goes with tensor 0."""

    file: WeightFile
    first: int
    last: int

    @property
    def bytes(self) -> int:
        return sum(count for _, _, count in self.file.tensors[self.first : self.last])


def one_chunk(file: WeightFile) -> FileChunk:
    """A complete file as one chunk."""
    return FileChunk(file, 0, len(file.tensors))


def chunks_of(file: WeightFile) -> list[FileChunk]:
    """A file in chunks of at least _CHUNK_BYTES, cut between layers: a few large files keep many workers busy."""
    layers = [_layer_of(name) for name, _, _ in file.tensors]
    cuts, held = [0], 0
    for index, (_, _, count) in enumerate(file.tensors):
        if held >= _CHUNK_BYTES and layers[index] != layers[index - 1]:
            cuts.append(index)
            held = 0
        held += count
    return [FileChunk(file, first, last) for first, last in itertools.pairwise([*cuts, len(file.tensors)])]


def _layer_of(name: str) -> str:
    """The number of the layer in a tensor's name; the name where it is of no layer."""
    return next((word for word in name.split(".") if word.isdigit()), name)


def write_chunk(directory: Path, chunk: FileChunk, dtype: str, read: Callable[[str], Iterator[torch.Tensor]]) -> dict:
    """Write a chunk of a file where it belongs; returns the file's name, where the chunk begins, its bytes and CRC-32.

    `read` gives a tensor's rows, a few at a time, in order.  Raises OSError if the disk refuses.
    """
    tensors = chunk.file.tensors
    head = header_of(tensors, CODE_OF[dtype])
    begin = len(head) + sum(count for _, _, count in tensors[: chunk.first]) if chunk.first else 0
    with ChecksummedFile(directory / chunk.file.name, begin) as file:
        for data in itertools.chain([] if chunk.first else [head], _bytes_of(chunk, read)):
            file.write(data)
    return {"path": chunk.file.name, "begin": begin, "bytes": file.count, "crc32": file.crc32}


def _bytes_of(chunk: FileChunk, read: Callable[[str], Iterator[torch.Tensor]]) -> Iterator[memoryview]:
    for name, _, count in chunk.file.tensors[chunk.first : chunk.last]:
        for rows in read(name):
            data = rows.contiguous().view(torch.uint8).numpy().reshape(-1).data
            count -= len(data)
            yield data
        if count:
            raise ValueError(f"{name}: {count} bytes were not given")


def write_index(directory: Path, files: list[WeightFile], dtype: str) -> None:
    """The index of several files, as transformers writes it."""
    total = sum(file.bytes for file in files)
    placed = {name: file.name for file in files for name, _, _ in file.tensors}
    metadata = {"total_parameters": total // getattr(torch, dtype).itemsize, "total_size": total}
    write_json(directory / INDEX, {"metadata": metadata, "weight_map": dict(sorted(placed.items()))})


def _natural(tensor: tuple) -> list[tuple[int, object]]:
    """The order in which transformers 5 fills files: by name, numbers as numbers."""
    return [(0, int(word)) if word.isdigit() else (1, word) for word in tensor[0].split(".")]


def _in_files(tensors: list[tuple], max_bytes: int) -> list[list[tuple]]:
    """Fill files in order, as huggingface_hub does: a tensor larger than a file may be gets one of its own."""
    files, current, held = [], [], 0
    for tensor in tensors:
        count = tensor[2]
        if count > max_bytes:
            files.append([tensor])
            continue
        if held + count > max_bytes:
            files.append(current)
            current, held = [], 0
        current.append(tensor)
        held += count
    return [*files, current] if current else files
