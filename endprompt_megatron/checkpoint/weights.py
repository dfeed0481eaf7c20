"""What of the model a rank stores and loads: which boxes of which global tensors are its own.

A checkpoint names tensors by their global shapes (Megatron's ShardedTensor says where a rank's weight lies
in one), so that ranks of any other layout find their parts.  Weights that several data-parallel ranks hold
are shared out among them: each writes, and reads, its part of the weights, and reading ends in a broadcast.
"""

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.utils import unwrap_model

from endprompt_megatron.convert.data_file import Stored
from endprompt_megatron.convert.direct import HfSource
from endprompt_megatron.convert.torch_dist import Checkpoint
from endprompt_megatron.runtime import together


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

    def stored(self) -> Stored:
        return Stored(self.key, self.global_shape, self.offset, self.shape, self.tensor.dtype, lambda: self.tensor)


def weights_of(models: list) -> list[Weight]:
    """The weights of this rank's chunks, in an order that is the same on all data-parallel ranks."""
    found = []
    for chunk in unwrap_model(models):
        for entry in chunk.sharded_state_dict().values():
            if not isinstance(entry, ShardedTensor | ShardedTensorFactory):
                continue
            parameter = entry.data
            for part in entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]:
                data = part.data.detach()
                if not data.is_contiguous() or data.untyped_storage().data_ptr() != _storage(parameter):
                    raise RuntimeError(f"{part.key} is no view of its parameter: its state cannot be found from it")
                tensor = data.view((1,) * part.prepend_axis_num + tuple(data.shape))
                found.append(
                    Weight(
                        part.key,
                        tuple(part.global_shape),
                        tuple(part.global_offset),
                        tensor,
                        parameter,
                        data.storage_offset() - parameter.storage_offset(),
                        not any(_copy_of(part.replica_id)),
                        part.allow_shape_mismatch,
                    )
                )
    return found


def _storage(tensor: torch.Tensor) -> int:
    return tensor.detach().untyped_storage().data_ptr()


def _copy_of(replica_id: int | tuple[int, ...]) -> tuple[int, ...]:
    """Which copy along the pipeline- and the tensor-parallel axis; the third number is the data-parallel rank."""
    return (replica_id,) if isinstance(replica_id, int) else tuple(replica_id)[:2]


def stored_weights(weights: list[Weight]) -> list[Stored]:
    """The weights that this rank writes: its part of those that the data-parallel ranks all hold."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    writers = _shared_out([weight.tensor.nbytes for weight in weights], group.size())
    return [
        weight.stored()
        for weight, writer in zip(weights, writers, strict=True)
        if weight.first and writer == group.rank()
    ]


def read_weights(weights: list[Weight], checkpoint: Checkpoint | HfSource) -> None:
    """Fill the weights: each data-parallel rank reads its part from the files, the others get it from there.

    Raises InputError where the files do not hold a tensor.
    """
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    readers = _shared_out([weight.tensor.nbytes for weight in weights], group.size())
    with together():
        for weight, reader in zip(weights, readers, strict=True):
            if reader == group.rank():
                tensor = weight.tensor
                into = tensor.data if tensor.device.type == "cpu" and tensor.is_contiguous() else None
                value = checkpoint.read(
                    weight.key, weight.offset, weight.shape, tensor.dtype, zero_outside=weight.padded, into=into
                )
                if into is None:
                    tensor.copy_(value)
    if group.size() > 1:
        sources = dist.get_process_group_ranks(group)
        for weight, reader in zip(weights, readers, strict=True):
            dist.broadcast(weight.tensor, src=sources[reader], group=group)


def _shared_out(sizes: list[int], count: int) -> list[int]:
    """Which of `count` ranks takes each item: the largest first, each to the one that has least."""
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


def read_objects(models: list, checkpoint: Checkpoint | HfSource) -> None:
    """Give modules back what `stored_objects` stored; where a checkpoint has nothing, they keep what they have.

    In a model that does not compute in FP8 its scales mean nothing, and Transformer Engine 2.18 refuses some of them.
    """
    for chunk in unwrap_model(models):
        if not chunk.config.fp8:
            continue
        found = {}
        for name, entry in chunk.sharded_state_dict().items():
            if isinstance(entry, ShardedObject):
                value = checkpoint.read_object(entry.unique_key)
                if value is not None:
                    found[name] = value.seek(0) or value if isinstance(value, io.BytesIO) else value
        if found:
            chunk.load_state_dict(found, strict=False)


def boxes(shape: tuple[int, ...], start: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Elements start..end-1 of a flattened tensor of `shape`, as (offset, shape) of boxes, in order.

    The distributed optimizer cuts flattened parameters anywhere.  Of a matrix such a range is at most three
    boxes: the rest of a row, whole rows, the beginning of a row; which any layout can read its own from.
    """
    if start >= end:
        return
    if len(shape) == 1:
        yield (start,), (end - start,)
        return
    row = math.prod(shape[1:])
    first, last = start // row, (end - 1) // row
    if first == last and end - start < row:
        for offset, size in boxes(shape[1:], start - first * row, end - first * row):
            yield (first, *offset), (1, *size)
        return
    if start % row:
        yield from boxes(shape, start, (first + 1) * row)
        first += 1
    whole = end // row
    if whole > first:
        yield (first,) + (0,) * (len(shape) - 1), (whole - first, *shape[1:])
    if end % row:
        yield from boxes(shape, whole * row, end)
