"""What of the model a rank stores and loads: which shards of which global tensors are its own.

A checkpoint names tensors by their global shapes (Megatron's ShardedTensor says where a rank's weight lies
in one), so that ranks of any other layout find their shards.  Weights that several data-parallel ranks hold
are divided among them: each writes, and reads, its share of the weights, and reading ends in a broadcast.
"""

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.utils import unwrap_model

from endprompt_megatron.checkpoint.shard_files import Shard
from endprompt_megatron.distributed.runtime import raise_on_all_ranks


class WeightSource(Protocol):
    """Weights to read from, by Megatron's names: torch_dist.Checkpoint, or convert.direct.HfSource."""

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

        With `zero_outside`, what lies outside the stored tensor (a padded vocabulary) is zero.  `into` is memory to
        use, of that shape and dtype.  Raises InputError if there is no such shard.
        """

    def read_object(self, key: str) -> object | None:
        """What was stored under `key` beside the tensors; None if nothing was."""


@dataclass(frozen=True)
class Weight:
    """A parameter of this rank, or one of the two halves of gate-and-up, and its place in a global tensor."""

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: torch.Tensor  # a view of the parameter, with the leading axes of the global tensor
    parameter: torch.nn.Parameter
    start: int  # where the view begins in the flattened parameter
    first: bool  # of the tensor- and pipeline-parallel ranks that hold the same: the one that stores it
    padded: bool  # its global shape may differ from the stored one: a vocabulary, padded for the layout

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def shard(self) -> Shard:
        return Shard(self.key, self.global_shape, self.offset, self.shape, self.tensor.dtype, lambda: self.tensor)


def weights_of(models: list) -> list[Weight]:
    """The weights of this rank's chunks, in an order that is the same on all data-parallel ranks."""
    found = []
    for chunk in unwrap_model(models):
        for entry in chunk.sharded_state_dict().values():
            if not isinstance(entry, ShardedTensor | ShardedTensorFactory):
                continue
            parameter = entry.data
            for shard in entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]:
                data = shard.data.detach()
                if not data.is_contiguous() or data.untyped_storage().data_ptr() != _storage(parameter):
                    raise RuntimeError(f"{shard.key} is no view of its parameter: its state cannot be found from it")
                tensor = data.view((1,) * shard.prepend_axis_num + tuple(data.shape))
                found.append(
                    Weight(
                        shard.key,
                        tuple(shard.global_shape),
                        tuple(shard.global_offset),
                        tensor,
                        parameter,
                        data.storage_offset() - parameter.storage_offset(),
                        not any(_copy_of(shard.replica_id)),
                        shard.allow_shape_mismatch,
                    )
                )
    return found


def _storage(tensor: torch.Tensor) -> int:
    return tensor.detach().untyped_storage().data_ptr()


def _copy_of(replica_id: int | tuple[int, ...]) -> tuple[int, ...]:
    """Which copy along the pipeline- and the tensor-parallel axis; the third number is the data-parallel rank."""
    return (replica_id,) if isinstance(replica_id, int) else tuple(replica_id)[:2]


def stored_weights(weights: list[Weight]) -> list[Shard]:
    """The weights that this rank writes: its share of those that the data-parallel ranks all hold."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    writers = _divided([weight.tensor.nbytes for weight in weights], group.size())
    return [
        weight.shard()
        for weight, writer in zip(weights, writers, strict=True)
        if weight.first and writer == group.rank()
    ]


def read_weights(weights: list[Weight], source: WeightSource) -> None:
    """Fill the weights: each data-parallel rank reads its share from the files, the others get it from there.

    Raises InputError where the files do not hold a tensor.
    """
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    readers = _divided([weight.tensor.nbytes for weight in weights], group.size())
    with raise_on_all_ranks():
        for weight, reader in zip(weights, readers, strict=True):
            if reader == group.rank():
                tensor = weight.tensor
                into = tensor.data if tensor.device.type == "cpu" and tensor.is_contiguous() else None
                value = source.read(
                    weight.key, weight.offset, weight.shape, tensor.dtype, zero_outside=weight.padded, into=into
                )
                if into is None:
                    tensor.copy_(value)
    if group.size() > 1:
        ranks = dist.get_process_group_ranks(group)
        for weight, reader in zip(weights, readers, strict=True):
            dist.broadcast(weight.tensor, src=ranks[reader], group=group)


def _divided(sizes: list[int], count: int) -> list[int]:
    """Which of `count` ranks takes each item: the largest first, each to the one with the smallest load."""
    loads, owners = [0] * count, [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        owners[index] = min(range(count), key=loads.__getitem__)
        loads[owners[index]] += sizes[index]
    return owners


def stored_objects(models: list) -> dict[str, object]:
    """What modules keep beside tensors (Transformer Engine's FP8 state), by Megatron's unique keys; ours to write."""
    return {
        entry.unique_key: entry.data
        for chunk in unwrap_model(models)
        for entry in chunk.sharded_state_dict().values()
        if isinstance(entry, ShardedObject) and not any(_replica(entry.replica_id))
    }


def _replica(replica_id: int | tuple[int, ...]) -> tuple[int, ...]:
    return (replica_id,) if isinstance(replica_id, int) else tuple(replica_id)


def read_objects(models: list, source: WeightSource) -> None:
    """Give modules back what `stored_objects` stored; where a checkpoint has nothing, they keep what they have.

    In a model that does not compute in FP8 its scales mean nothing, and Transformer Engine 2.18 refuses some of them.
    """
    for chunk in unwrap_model(models):
        if not chunk.config.fp8:
            continue
        found = {}
        for name, entry in chunk.sharded_state_dict().items():
            if isinstance(entry, ShardedObject):
                value = source.read_object(entry.unique_key)
                if value is not None:
                    found[name] = value.seek(0) or value if isinstance(value, io.BytesIO) else value
        if found:
            chunk.load_state_dict(found, strict=False)


def shards_of_range(shape: tuple[int, ...], start: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Elements start..end-1 of a flattened tensor of `shape`, as (offset, shape) of shards, in order.

    The distributed optimizer cuts flattened parameters anywhere.  Of a matrix such a range is at most three
    shards: the rest of a row, complete rows, the beginning of a row; which any layout can read its own from.
    """
    if start >= end:
        return
    if len(shape) == 1:
        yield (start,), (end - start,)
        return
    row = math.prod(shape[1:])
    first, last = start // row, (end - 1) // row
    if first == last and end - start < row:
        for offset, size in shards_of_range(shape[1:], start - first * row, end - first * row):
            yield (first, *offset), (1, *size)
        return
    if start % row:
        yield from shards_of_range(shape, start, (first + 1) * row)
        first += 1
    complete = end // row
    if complete > first:
        yield (first,) + (0,) * (len(shape) - 1), (complete - first, *shape[1:])
    if end % row:
        yield from shards_of_range(shape, complete * row, end)
