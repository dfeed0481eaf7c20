"""Start from Hugging Face weights as they are: a rank reads its own shards, and no converted checkpoint is made.

HfSource is a WeightSource (checkpoint/weights.py) as torch_dist.Checkpoint is: loading does not know which of the two
it reads.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from endprompt_megatron.checkpoint import layout
from endprompt_megatron.common.errors import InputError
from endprompt_megatron.convert import mapping
from endprompt_megatron.convert.hf_weights import HfWeights
from endprompt_megatron.model.shape import ModelShape, read_shape

if TYPE_CHECKING:
    from endprompt_megatron.checkpoint.torch_dist import Checkpoint


_MAX_ELEMENTS = 32 << 20


class HfSource:
    """Megatron's tensors of a Hugging Face directory.  Only headers are read until a shard is asked for.

    `once`: no shard will be read twice.
    """

    def __init__(self, directory: Path, *, once: bool = False):
        """Raises InputError unless the directory holds all weights of the model in its config.json, and no others."""
        self.directory = directory
        shape = read_shape(directory)
        mapped = list(mapping.mapped_tensors(shape))
        self.weights = HfWeights(directory, once=once)
        self.dtypes = self.weights.check(mapped, mapping.tied_copy(shape))  # names, each with a tensor that has it
        self.mapped: dict[tuple[str, int], list[mapping.MappedTensor]] = {}  # by Megatron's name and the layer
        for tensor in mapped:
            layer = tensor.offset[0] if tensor.per_layer else 0
            self.mapped.setdefault((tensor.key, layer), []).append(tensor)

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
        """The shard of Megatron's tensor `key` that starts at `offset` and has `shape`, cast to `dtype`, on the CPU.

        With `zero_outside`, rows beyond the vocabulary are zero; `into` is memory to use, of that shape and dtype.
        Raises InputError where there is no such shard.
        """
        target = torch.empty(shape, dtype=dtype) if into is None else into
        if zero_outside:
            target.zero_()
        per_layer = key.startswith(mapping.LAYERS)
        filled = 0
        for index in range(shape[0] if per_layer else 1):
            shard = target[index] if per_layer else target
            at = offset[1:] if per_layer else offset
            for mapped in self.mapped.get((key, offset[0] + index if per_layer else 0), []):
                filled += self._fill(shard, at, mapped)
        lacking = target.numel() - filled
        if lacking and not zero_outside:
            raise InputError(f"{self.directory}: has nothing for {lacking} of {target.numel()} elements of {key}")
        return target

    def shape(self, key: str) -> tuple[int, ...] | None:
        """Global shape of Megatron's tensor `key`; None if there is none."""
        mapped = self.mapped.get((key, 0))
        return mapped[0].global_shape if mapped else None

    def row_cuts(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...], axis: int) -> list[int]:
        """Where to cut a slice along `axis` into parts of _MAX_ELEMENTS; offset[axis] comes first, its end last."""
        first, last = offset[axis], offset[axis] + shape[axis]
        rows = max(1, _MAX_ELEMENTS // (math.prod(shape) // shape[axis]))
        return [*range(first, last, rows), last]

    def read_object(self, key: str) -> None:
        """None: Hugging Face weights have no state of Transformer Engine beside them."""
        return None

    def _fill(self, target: torch.Tensor, offset: tuple[int, ...], mapped: mapping.MappedTensor) -> int:
        """Put what lies in both `mapped` and `target`, which starts at `offset`, into it; returns how much that is."""
        begin = mapped.offset[1] if mapped.per_layer else mapped.offset[0]
        first, last = offset[0] - begin, offset[0] - begin + target.shape[0]
        filled, spans = 0, list(mapping.spans(mapped, max(first, 0), min(last, mapped.rows)))
        for name, begin, count, _ in spans:
            self.weights.expect(name, begin, count)
        for name, begin, count, row in spans:
            rows = target[row - first : row - first + count]
            self.weights.read_into(rows, name, (begin, *offset[1:]))
            filled += rows.numel()
        return filled


def weights_at(source: Path, shape: ModelShape, flag: str) -> "HfSource | Checkpoint":
    """The weights in a Hugging Face directory, or in a Megatron checkpoint.  `flag` opens messages.

    Raises InputError if `source` is neither, not complete, or of another model than `shape`.
    """
    if layout.is_hugging_face(source):
        layout.refuse_other_model(read_shape(source), shape, f"{flag}={source}")
        return HfSource(source)
    from endprompt_megatron.convert.over_base import checkpoint_at

    directory = layout.find_checkpoint(source, flag=flag)
    layout.refuse_other_model(read_shape(directory / layout.HF_DIRECTORY), shape, f"{flag}={source}")
    return checkpoint_at(directory)


def weights_to_start_from(source: Path, shape: ModelShape, flag: str) -> "HfSource | Checkpoint":
    """`weights_at`, for training.  Raises InputError as well for LoRA's adapters: those of a run start anew."""
    from endprompt_megatron.checkpoint.torch_dist import Checkpoint
    from endprompt_megatron.convert.lora_merge import adapted

    weights = weights_at(source, shape, flag)
    if isinstance(weights, Checkpoint) and adapted(weights):
        raise InputError(
            f"{flag}={source} holds LoRA's adapters beside the weights: merge them by "
            "tools/convert_megatron_to_hf.py and start from the result"
        )
    return weights
