"""Megatron-Core's `torch_dist` checkpoint format, written and read piece by piece.  Knows no model.

The format is torch.distributed.checkpoint's, plus metadata.json and common.pt.  Going to torch's own reader and
writer instead of megatron.core.dist_checkpointing needs no process group, no CUDA and no second process, and
asks for one tensor at a time: memory is that of the largest piece, whatever the size of the model.
"""

import bisect
import contextlib
import io
import math
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from endprompt_megatron.errors import InputError
from endprompt_megatron.files import write_json

# What megatron.core.dist_checkpointing.core.CheckpointingConfig("torch_dist", 1) writes.
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class Stored:
    """One part of a global tensor; `load` gives its data, of `shape` and `dtype`, when its turn to be written comes."""

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]


def write(directory: Path, tensors: list[Stored], objects: dict[str, object]) -> None:
    """Write a checkpoint into the empty `directory`.  `objects` are Megatron's ShardedObjects by their unique keys.

    Raises OSError if the disk refuses.
    """
    writer = FileSystemWriter(directory, single_file_per_rank=True, thread_count=1)
    planner = _SavePlanner(tensors, objects)
    writer.set_up_storage_writer(is_coordinator=True)
    plan = writer.prepare_local_plan(planner.create_local_plan())
    plans, metadata = planner.create_global_plan([plan])
    (plan,) = writer.prepare_global_plan(plans)
    with _as_os_error():
        results = writer.write_data(planner.finish_plan(plan), planner).wait()
        writer.finish(metadata, [results])
        torch.save({}, directory / "common.pt")
        write_json(directory / "metadata.json", FORMAT)


class _SavePlanner(DefaultSavePlanner):
    """A plan made from a list of parts instead of a state dict; data is fetched when it is written."""

    def __init__(self, tensors: list[Stored], objects: dict[str, object]):
        super().__init__(flatten_state_dict=False)
        self.tensors = {(part.key, torch.Size(part.offset)): part for part in tensors}
        self.objects = objects

    def create_local_plan(self) -> SavePlan:
        items = []
        for part in self.tensors.values():
            offset = torch.Size(part.offset)
            data = TensorWriteData(
                chunk=ChunkStorageMetadata(offsets=offset, sizes=torch.Size(part.shape)),
                properties=TensorProperties(dtype=part.dtype),
                size=torch.Size(part.global_shape),
            )
            items.append(WriteItem(MetadataIndex(part.key, offset), WriteItemType.SHARD, tensor_data=data))
        items += [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self.objects]
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        index = write_item.index
        if write_item.type == WriteItemType.BYTE_IO:
            buffer = io.BytesIO()
            torch.save([self.objects[index.fqn]], buffer)  # Megatron stores the list of a key's local objects
            return buffer
        part = self.tensors[index.fqn, index.offset]
        tensor = part.load()
        if tuple(tensor.shape) != part.shape or tensor.dtype != part.dtype:
            raise ValueError(f"{part.key} at {part.offset}: {tuple(tensor.shape)} {tensor.dtype}, not {part}")
        return tensor


class Checkpoint:
    """A checkpoint to read from, whatever layout wrote it.  Only metadata is read until a tensor is asked for."""

    def __init__(self, directory: Path):
        """Raises InputError if `directory` does not hold a readable `torch_dist` checkpoint."""
        self.directory = directory
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
    ) -> torch.Tensor:
        """The part of the tensor `key` that starts at `offset` and has `shape`, cast to `dtype`, on the CPU.

        With `zero_outside`, what lies outside the stored tensor (a vocabulary padded for another layout) is zero.
        Raises InputError if the files do not hold all of the rest.
        """
        target = (torch.zeros if zero_outside else torch.empty)(shape, dtype=dtype)
        wanted = ChunkStorageMetadata(offsets=torch.Size(offset), sizes=torch.Size(shape))
        with self._damage(key):
            expected = target.numel()
            if zero_outside:
                ends = zip(self.tensors[key].size, offset, shape, strict=True)
                expected = math.prod(max(min(size - begin, count), 0) for size, begin, count in ends)
            items = create_read_items_for_chunk_list(key, self._near(key, offset[0], offset[0] + shape[0]), [wanted])
            if sum(item.lengths.numel() for item in items) != expected:
                raise ValueError("parts of it were never written")
            self.reader.read_data(LoadPlan(items), _LoadPlanner(target)).wait()
        return target

    def _near(self, key: str, first: int, last: int) -> TensorStorageMetadata:
        """The tensor's metadata with the chunks alone that reach into first..last-1 of its first axis.

        That axis is the layers of most tensors: to compare a box with every chunk of every layer and rank would
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
        except (OSError, RuntimeError, ValueError, EOFError, KeyError, AttributeError, pickle.UnpicklingError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(
                f"{self.directory}: {what} cannot be read ({reason}); the checkpoint is damaged"
            ) from error


class _LoadPlanner(DefaultLoadPlanner):
    """Puts everything that is read into one tensor."""

    def __init__(self, target: torch.Tensor):
        super().__init__()
        self.target = target

    def resolve_tensor(self, read_item) -> torch.Tensor:
        part = self.target
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(axis, start, length)
        return part


class _ObjectPlanner(DefaultLoadPlanner):
    """Keeps the one object that is read."""

    value: Any = None

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.value = torch.load(value, map_location="cpu", weights_only=False)


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    """torch.save turns a full disk into a RuntimeError of its own; give back the operating system's error."""
    try:
        yield
    except RuntimeError as error:
        cause = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise cause from error
