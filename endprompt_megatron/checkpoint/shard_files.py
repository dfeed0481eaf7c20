"""The data files of a `torch_dist` checkpoint, written shard by shard; torch_dist.describe completes the checkpoint.

Apart from torch_dist, since torch.distributed.checkpoint takes a second to import and workers need none of it.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from endprompt_megatron.common.direct_io import ChecksummedFile


@dataclass(frozen=True)
class Shard:
    """A slice of a global tensor; `load` gives its data, of `shape` and `dtype`, when its turn to be written comes."""

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]


def write_file(directory: Path, name: str, tensors: Iterable[Shard], objects: dict[str, object]) -> dict:
    """Write a checkpoint's data file `name`; returns a report, for JSON and for `describe`.

    `objects` are Megatron's ShardedObjects by their unique keys.  The report has `file`, `bytes`, `crc32` and `rows`.
    Memory: one tensor's, beyond what is given.  Raises OSError if the disk refuses.
    """
    rows: list[list] = []
    with ChecksummedFile(directory / name) as file:
        for shard in tensors:
            tensor = shard.load().detach().cpu().contiguous()
            if tuple(tensor.shape) != shard.shape or tensor.dtype != shard.dtype:
                raise ValueError(f"{shard.key} at {shard.offset}: {tuple(tensor.shape)} {tensor.dtype}, not {shard}")
            if tensor.untyped_storage().size() != tensor.nbytes:
                tensor = tensor.clone()  # torch.save writes the complete storage that a view looks at
            begin = file.count
            _save(tensor, file)
            dtype = str(shard.dtype).removeprefix("torch.")
            rows.append([shard.key, begin, file.count - begin, shard.offset, shard.shape, shard.global_shape, dtype])
            del tensor  # before the next is made
        for key, value in objects.items():
            begin = file.count
            _save([value], file)  # Megatron stores the list of a key's local objects
            rows.append([key, begin, file.count - begin])
    return {"file": name, "bytes": file.count, "crc32": file.crc32, "rows": rows}


def _save(value: object, file: ChecksummedFile) -> None:
    """torch.save, which hides the operating system's error behind one of its own."""
    try:
        with _without_own_checksums():
            torch.save(value, file)
    except (RuntimeError, OSError):
        if file.error is not None:
            raise file.error from None
        raise


@contextlib.contextmanager
def _without_own_checksums() -> Iterator[None]:
    """torch.save computes a CRC-32 that torch.load does not look at, at a third of a disk's speed."""
    options = torch.serialization
    if not hasattr(options, "set_crc32_options"):  # torch before 2.6
        yield
        return
    before = options.get_crc32_options()
    options.set_crc32_options(False)
    try:
        yield
    finally:
        options.set_crc32_options(before)
