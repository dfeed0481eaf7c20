"""Weights of a Hugging Face directory: found, checked, and read lazily, one tensor at a time.

One file or several with an index, safetensors or the older pytorch_model.bin.
"""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from endprompt_megatron.checkpoint.tensor_reader import Record, read_into, refuse_overflow
from endprompt_megatron.common.direct_io import OnceFile
from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.files import read_json, refuse_pointer
from endprompt_megatron.convert.bin_files import BinFile
from endprompt_megatron.convert.mapping import MappedTensor
from endprompt_megatron.convert.safetensors_header import Entry, read_header
from endprompt_megatron.model.shape import something_else

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
OLD_SINGLE = "pytorch_model.bin"
OLD_INDEX = "pytorch_model.bin.index.json"
DTYPE_OF = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
CODE_OF = {name: code for code, name in DTYPE_OF.items()}
_NAMED = 3  # tensors that a message names
# What older classes and patched ones save beside the weights: computed from the config, read by nobody.
_BUFFER = re.compile(r"rotary_emb\.[a-z_]*(inv_freq|cos|sin)[a-z_]*$|^rope\.freqs$|\.(masked_bias|causal_mask)$")


def weight_files(directory: Path) -> list[str]:
    """Names of the files with weights, that an index may name before they are there; empty if there are none."""
    index = _index(directory)
    if index is not None:
        return sorted(set(index[1].values()))
    whole = [name for name in (SINGLE, OLD_SINGLE) if (directory / name).is_file()][:1]
    return whole or _shards_without_index(directory)


_SHARD = re.compile(r"(model-|pytorch_model-)(\d{5})-of-(\d{5})(\.safetensors|\.bin)")


def _shards_without_index(directory: Path) -> list[str]:
    """All shards of a set, by their names alone; [] where there are none.  Raises InputError if some lack."""
    found = sorted(filter(None, (_SHARD.fullmatch(path.name) for path in directory.glob("*model-*"))), key=_set_of)
    if not found:
        return []
    begin, _, count, ending = found[0].groups()
    names = [f"{begin}{number:05d}-of-{count}{ending}" for number in range(1, int(count) + 1)]
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise InputError(
            f"{directory}: {len(names) - len(missing)} of {len(names)} shards and no index; missing are "
            f"{', '.join(missing[:_NAMED])}{' ...' if len(missing) > _NAMED else ''}: is the download complete?"
        )
    return names


def _set_of(shard: re.Match) -> tuple[bool, str, str]:
    """Orders shards: safetensors first, then by set."""
    return shard.group(4) != ".safetensors", shard.group(3), shard.group(2)


def _index(directory: Path) -> tuple[Path, dict[str, str]] | None:
    """The index of which file each tensor is in; None without one, or beside one whole file, which is taken."""
    for name in (SINGLE, INDEX, OLD_SINGLE, OLD_INDEX):
        path = directory / name
        if not path.is_file():
            continue
        if name in (SINGLE, OLD_SINGLE):
            return None
        index = read_json(path, "an index of weights").get("weight_map")
        if not isinstance(index, dict) or not index:
            raise InputError(f"{path}: has no weight_map; download the index again")
        return path, index
    return None


def entries_of(path: Path) -> dict[str, Entry]:
    """The tensors of one weight file by name.  Raises ValueError if it is damaged; InputError for a .bin file."""
    return BinFile(path).entries() if path.suffix == ".bin" else read_header(path)


@dataclass(frozen=True)
class _Held:
    """A tensor in an open file: the library's, and for safetensors the plain file with its place in it."""

    file_name: str
    entry: Entry
    library: Any
    plain: Any = None
    record: Record | None = None


class HfWeights:
    """The weights of a directory.  Headers are read at once, tensors when they are asked for.

    Where there are both safetensors and pytorch_model.bin, the first.  `once`: no shard will be read twice.
    """

    def __init__(self, directory: Path, *, once: bool = False):
        """Raises InputError if a file is missing, truncated, or does not hold what the index says."""
        self.directory, self.once = directory, once
        self.tensors: dict[str, _Held] = {}
        files = weight_files(directory)
        if not files:
            held = something_else(directory)
            raise InputError(
                f"{directory}: {held}"
                if held
                else f"{directory}: no {SINGLE}, no {INDEX} and no {OLD_SINGLE}; weights in other formats: load them "
                "with transformers and save_pretrained"
            )
        for name in files:
            self._open(name)
        index = _index(directory)
        if index is not None:
            path, placed = index
            for tensor, name in placed.items():
                if tensor not in self.tensors or self.tensors[tensor].file_name != name:
                    raise InputError(f"{path}: says that {tensor} is in {name}, but it is not there")

    def _open(self, name: str) -> None:
        from safetensors import SafetensorError, safe_open

        path = self.directory / name
        if not path.is_file():
            raise InputError(f"{path}: no such file, though the index names it; download this shard")
        refuse_pointer(path)
        try:
            if path.suffix == ".bin":
                library = BinFile(path)
                held = {t: _Held(name, entry, library) for t, entry in library.entries().items()}
            else:
                library = safe_open(path, framework="pt")  # which looks for holes and overlaps besides
                plain = OnceFile(path) if self.once else open(path, "rb", buffering=0)  # noqa: SIM115
                held = {
                    tensor: _Held(name, entry, library, plain, _record(entry))
                    for tensor, entry in read_header(path).items()
                }
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read as safetensors ({_first_line(error)}); truncated?") from error
        for tensor in held:
            if tensor in self.tensors:
                raise InputError(
                    f"{path}: {tensor} is in {self.tensors[tensor].file_name} as well; remove one of the files"
                )
        self.tensors |= held

    def check(self, mapped: list[MappedTensor], tied_copy: tuple[str, str] | None) -> dict[str, str]:
        """Compare with what the config promises; returns the dtypes ("bfloat16"), each with a tensor that has it.

        `tied_copy`: see mapping.  Raises InputError for a missing, unexpected, quantised or wrongly shaped tensor.
        Ignored are old checkpoints' rotary buffers and, in a tied model, a copy of the embedding.
        """
        expected = {name: shape for tensor in mapped for name, shape in tensor.hf}
        embedding, copy = tied_copy or (None, None)
        for tensor, held in self.tensors.items():
            where = f"{self.directory / held.file_name}: {tensor}"
            if _BUFFER.search(tensor):
                continue
            if tensor == copy:
                if embedding in self.tensors and not torch.equal(self.get(tensor), self.get(embedding)):
                    raise InputError(f"{where} differs from {embedding}; set tie_word_embeddings=false in config.json")
                continue
            if tensor not in expected:
                raise InputError(f"{where} is not a tensor of the model in config.json; is it another architecture?")
            code, shape = held.entry.dtype, held.entry.shape
            if code not in DTYPE_OF:
                raise InputError(f"{where} has dtype {code}: quantised weights are not supported; use BF16, F16 or F32")
            if shape != expected[tensor]:
                raise InputError(f"{where} has shape {list(shape)}; config.json says {list(expected[tensor])}")
        missing = [tensor for tensor in expected if tensor not in self.tensors]
        if missing:
            said = f"{len(missing)} tensors are missing: " if len(missing) > 1 else "a tensor is missing: "
            more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
            raise InputError(f"{self.directory}: {said}{', '.join(missing[:_NAMED])}{more}; is the download complete?")
        found: dict[str, str] = {}
        for tensor in expected:
            found.setdefault(DTYPE_OF[self.tensors[tensor].entry.dtype], tensor)
        return found

    def get(self, tensor: str) -> torch.Tensor:
        """One tensor, read now."""
        return self.tensors[tensor].library.get_tensor(tensor)

    def dtype(self, tensor: str) -> torch.dtype:
        """What one tensor is stored in."""
        return getattr(torch, DTYPE_OF[self.tensors[tensor].entry.dtype])

    def read_slice(self, tensor: str, slices: tuple[slice, ...]) -> torch.Tensor:
        """A slice of one tensor; no more than that is read."""
        return self.tensors[tensor].library.get_slice(tensor)[slices]

    def read_into(self, target: torch.Tensor, tensor: str, offset: tuple[int, ...]) -> None:
        """Fill `target` with the slice of a tensor that starts at `offset`, cast to the target's dtype.

        From safetensors without a copy in between.  Raises InputError if the file has been cut meanwhile, and for a
        number that the target's dtype cannot hold.
        """
        held = self.tensors[tensor]
        where = f"{self.directory / held.file_name}: {tensor}"
        slices = tuple(slice(begin, begin + size) for begin, size in zip(offset, target.shape, strict=True))
        if held.record is None:
            target.copy_(self.read_slice(tensor, slices))
        else:
            try:
                read_into(target, held.plain, held.record, offset)
            except ValueError as error:
                raise InputError(f"{where}: {error}") from None
        refuse_overflow(target, self.dtype(tensor), lambda: self.read_slice(tensor, slices), where)

    def expect(self, tensor: str, first: int, count: int) -> None:
        """Let the disk begin with rows that are asked for next: of queries, keys and values a few here, a few there."""
        held = self.tensors[tensor]
        if held.record is not None and not self.once and hasattr(os, "posix_fadvise"):
            record = held.record
            row = math.prod(record.shape[1:]) * record.dtype.itemsize
            begin = record.begin + first * row
            os.posix_fadvise(held.plain.fileno(), begin, count * row, os.POSIX_FADV_WILLNEED)


def _record(entry: Entry) -> Record | None:
    """Where to read a tensor without the library; None for a dtype that is not one of a model's weights."""
    if entry.dtype not in DTYPE_OF:
        return None
    return Record(entry.begin, entry.shape, getattr(torch, DTYPE_OF[entry.dtype]))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
