"""Megatron-Core's `torch_dist` checkpoint format, written and read shard by shard.  Knows no model.

The format is torch.distributed.checkpoint's, plus metadata.json and common.pt.  Going to torch's own reader and
writer instead of megatron.core.dist_checkpointing needs no process group, no CUDA and no second process, and
asks for one tensor at a time: memory is that of the shard that is asked for, whatever the size of the model.
"""

import bisect
import contextlib
import functools
import io
import math
import pickle
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from endprompt_megatron.checkpoint import tensor_reader
from endprompt_megatron.common.direct_io import OnceFile
from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.files import write_json

_MAX_BYTES = 64 << 20

# What megatron.core.dist_checkpointing.core.CheckpointingConfig("torch_dist", 1) writes.
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def describe(directory: Path, reports: list[dict], common: dict) -> None:
    """Make a checkpoint of the data files that the reports of shard_files.write_file tell of.

    Raises RuntimeError if together they do not hold every element of every tensor once.
    """
    tensors: dict[str, TensorStorageMetadata] = {}
    objects: dict[str, BytesStorageMetadata] = {}
    results = []
    for report in reports:
        file = sys.intern(report["file"])
        for key, begin, length, *rest in report["rows"]:
            key = sys.intern(key)
            if rest:
                offset, shape, global_shape, dtype = rest
                if key not in tensors:
                    properties = TensorProperties(dtype=getattr(torch, dtype))
                    tensors[key] = TensorStorageMetadata(properties, torch.Size(global_shape), [])
                tensors[key].chunks.append(ChunkStorageMetadata(torch.Size(offset), torch.Size(shape)))
                index = MetadataIndex(key, torch.Size(offset))
            else:
                objects[key] = BytesStorageMetadata()
                index = MetadataIndex(key)
            results.append(WriteResult(index, length, _StorageInfo(file, begin, length)))
    for key, tensor in tensors.items():
        written = sum(math.prod(chunk.sizes) for chunk in tensor.chunks)
        if written != math.prod(tensor.size):
            raise RuntimeError(f"{key}: {written} elements of {list(tensor.size)} were to be stored")
    _Describer(directory).finish(Metadata({**tensors, **objects}), [results])
    torch.save(common, directory / "common.pt")
    write_json(directory / "metadata.json", FORMAT)


class _Describer(FileSystemWriter):
    """Leaves out a random number and the directory's name at the time, so that the same is written as the same."""

    def storage_meta(self) -> None:
        return None


class Checkpoint:
    """A checkpoint to read from, whatever layout wrote it.  Only metadata is read until a tensor is asked for.

    `once`: no shard will be read twice.
    """

    def __init__(self, directory: Path, *, once: bool = False):
        """Raises InputError if `directory` does not hold a readable `torch_dist` checkpoint."""
        self.directory = directory
        self.open = OnceFile if once else functools.partial(open, mode="rb", buffering=0)
        self.reader = FileSystemReader(directory)
        if not (directory / "metadata.json").is_file():
            raise InputError(f"{directory}: not a torch_dist checkpoint, metadata.json is missing")
        with self._damage(".metadata"):
            metadata = self.reader.read_metadata()
            self.reader.set_up_storage_reader(metadata, is_coordinator=True)
            self.tensors = {
                key: value
                for key, value in metadata.state_dict_metadata.items()
                if isinstance(value, TensorStorageMetadata)
            }
            self.objects = set(metadata.state_dict_metadata) - set(self.tensors)
        self.by_first: dict[str, tuple[list[int], dict[int, list[ChunkStorageMetadata]]]] = {}
        self.longest: dict[str, int] = {}

    def shape(self, key: str) -> tuple[int, ...] | None:
        """Global shape of the tensor `key`; None if there is none."""
        return tuple(self.tensors[key].size) if key in self.tensors else None

    def dtype(self, key: str) -> torch.dtype:
        """What the tensor `key` is stored in.  Raises InputError if there is none."""
        with self._damage(key):
            return self.tensors[key].properties.dtype

    def is_float(self, key: str) -> bool:
        """Whether the tensor `key` is stored in floating point.  Raises InputError if there is none."""
        with self._damage(key):
            return self.tensors[key].properties.dtype.is_floating_point

    def read(
        self,
        key: str,
        offset: tuple[int, ...],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        zero_outside: bool = False,
        into: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The shard of the tensor `key` that starts at `offset` and has `shape`, cast to `dtype`, on the CPU.

        With `zero_outside`, what lies outside the stored tensor (a vocabulary padded for another layout) is zero.
        `into` is memory to use, of that shape and dtype.  Raises InputError if the files do not hold all of the rest.
        """
        target = torch.empty(shape, dtype=dtype) if into is None else into
        if zero_outside:
            target.zero_()
        wanted = ChunkStorageMetadata(offsets=torch.Size(offset), sizes=torch.Size(shape))
        with self._damage(key):
            expected = target.numel()
            if zero_outside:
                ends = zip(self.tensors[key].size, offset, shape, strict=True)
                expected = math.prod(max(min(size - begin, count), 0) for size, begin, count in ends)
            near = self._near(key, offset[0], offset[0] + shape[0])
            items = create_read_items_for_chunk_list(key, near, [wanted])
            if sum(item.lengths.numel() for item in items) != expected:
                raise ValueError("shards of it were never written")
            stored = {chunk.offsets: tuple(chunk.sizes) for chunk in near.chunks}
            for item in items:
                self._read_item(target, item, stored[item.storage_index.offset])
        return target

    def _read_item(self, target: torch.Tensor, item: ReadItem, stored: tuple[int, ...]) -> None:
        """Put what `item` takes out of one stored shard, of shape `stored`, into its place in `target`."""
        place = self.reader.storage_data[item.storage_index]
        if not getattr(place, "transform_descriptors", None):
            with self.open(self.directory / place.relative_path) as file:
                record = tensor_reader.find(file, place.offset, place.length)
                if record is not None:
                    if record.shape != stored:
                        raise ValueError(f"a shard has shape {list(record.shape)} instead of {list(stored)}")
                    tensor_reader.read_into(_filled_by(target, item), file, record, tuple(item.storage_offsets))
                    return
        self.reader.read_data(LoadPlan([item]), _LoadPlanner(target)).wait()

    def row_cuts(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...], axis: int) -> list[int]:
        """Where to cut a slice along `axis` so that no stored shard is cut, unless it is larger than _MAX_BYTES bytes.

        offset[axis] comes first, its end last.
        """
        first, last = offset[axis], offset[axis] + shape[axis]
        row = math.prod(shape) // shape[axis] * self.tensors[key].properties.dtype.itemsize
        cuts = {first, last}
        for chunk in self._near(key, offset[0], offset[0] + shape[0]).chunks:
            begin, end = chunk.offsets[axis], chunk.offsets[axis] + chunk.sizes[axis]
            cuts |= {cut for cut in (*range(begin, end, max(1, _MAX_BYTES // row)), end) if first < cut < last}
        return sorted(cuts)

    def _near(self, key: str, first: int, last: int) -> TensorStorageMetadata:
        """The tensor's metadata with only the chunks that reach into first..last-1 of its first axis.

        That axis is the layers of most tensors: to compare a slice with every chunk of every layer and rank would
        take minutes at 405B.
        """
        if key not in self.by_first:
            table: dict[int, list[ChunkStorageMetadata]] = {}
            self.longest[key] = max((chunk.sizes[0] for chunk in self.tensors[key].chunks), default=0)
            for chunk in self.tensors[key].chunks:
                table.setdefault(chunk.offsets[0], []).append(chunk)
            self.by_first[key] = sorted(table), table
        starts, table = self.by_first[key]
        reach = starts[bisect.bisect_right(starts, first - self.longest[key]) : bisect.bisect_left(starts, last)]
        chunks = [chunk for start in reach for chunk in table[start]]
        return replace(self.tensors[key], chunks=chunks)

    def read_object(self, key: str) -> object | None:
        """What Megatron stored as the ShardedObject `key`; None if there is nothing.  Runs pickled code."""
        if key not in self.objects:
            return None
        planner = _ObjectPlanner()
        item = ReadItem(
            type=LoadItemType.BYTE_IO,
            dest_index=MetadataIndex(key),
            dest_offsets=torch.Size((0,)),
            storage_index=MetadataIndex(key),
            storage_offsets=torch.Size((0,)),
            lengths=torch.Size((0,)),
        )
        with self._damage(key):
            self.reader.read_data(LoadPlan([item]), planner).wait()
            (value,) = planner.value
        return value

    @contextlib.contextmanager
    def _damage(self, what: str) -> Iterator[None]:
        try:
            yield
        except (
            OSError,
            RuntimeError,
            ValueError,
            EOFError,
            KeyError,
            AttributeError,
            pickle.UnpicklingError,
            zipfile.BadZipFile,
        ) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(
                f"{self.directory}: {what} cannot be read ({reason}); the checkpoint is damaged"
            ) from error


class _LoadPlanner(DefaultLoadPlanner):
    """Puts what torch reads into one tensor."""

    def __init__(self, target: torch.Tensor):
        super().__init__()
        self.target = target

    def resolve_tensor(self, read_item) -> torch.Tensor:
        return _filled_by(self.target, read_item)


def _filled_by(target: torch.Tensor, item: ReadItem) -> torch.Tensor:
    """The slice of `target` that an item fills."""
    for axis, (start, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
        target = target.narrow(axis, start, length)
    return target


class _ObjectPlanner(DefaultLoadPlanner):
    """Keeps the one object that is read."""

    value: Any = None

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.value = torch.load(value, map_location="cpu", weights_only=False)
