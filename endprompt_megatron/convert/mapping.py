"""The one map between Hugging Face's weights and Megatron-Core's: names, shapes, how they combine.

Both directions of the conversion read the rows of the model's family (model/families.py).  On the Megatron side the
names are those of a GPTModel's sharded state dict with homogeneous layers: all layers of one weight are one tensor,
stacked in axis 0, and the norms carry the names that Transformer Engine's fused layers give them (the layer spec
without Transformer Engine maps its own to these).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from endprompt_megatron.model.families import EMBEDDING, FAMILIES, LAYERS, OUTPUT, Row
from endprompt_megatron.model.shape import ModelShape

if TYPE_CHECKING:
    from torch import Tensor

PADDED = (EMBEDDING, OUTPUT)  # Megatron may pad their vocabulary


@dataclass(frozen=True)
class MappedTensor:
    """A row of the map in one layer: the smallest slice of a Megatron weight that holds complete Hugging Face weights.

    `offset` and `shape` say which slice of the global tensor `key`, of `global_shape`, this is; per-layer weights
    have the layer in axis 0.  `hf` names the Hugging Face weights with their shapes.
    """

    key: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    hf: tuple[tuple[str, tuple[int, ...]], ...]
    groups: int = 0  # KV groups that the weights are dealt out by; 0: one weight, as it is

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def per_layer(self) -> bool:
        return self.key.startswith(LAYERS)

    @property
    def rows(self) -> int:
        """Length of the axis along which the Hugging Face weights follow each other."""
        return self.shape[1] if self.per_layer else self.shape[0]


def extra_states(shape: ModelShape) -> list[str]:
    """Objects that a GPTModel's sharded state dict asks for beside its weights.  Only FP8 puts anything into them."""
    attention = ["linear_qkv", "linear_proj", *(["q_layernorm", "k_layernorm"] if shape.qk_norm else [])]
    names = [f"self_attention.{name}" for name in attention] + ["mlp.linear_fc1", "mlp.linear_fc2"]
    return [*(f"{LAYERS}{name}._extra_state" for name in names), "decoder.final_layernorm._extra_state"]


def tied_copy(shape: ModelShape) -> tuple[str, str] | None:
    """Hugging Face's names of the embedding and of the copy that some tied checkpoints hold; None if not tied."""
    family = FAMILIES[shape.family]
    return (family.hf_name(EMBEDDING), family.hf_name(OUTPUT)) if shape.tied_embeddings else None


def mapped_tensors(shape: ModelShape) -> Iterator[MappedTensor]:
    """All tensors of the model as they map, layer by layer.  The vocabulary is not padded."""
    for per_layer, rows in itertools.groupby(FAMILIES[shape.family].rows, key=lambda row: row.per_layer):
        block = [row for row in rows if row.only_if is None or getattr(shape, row.only_if)]
        for layer in range(shape.num_layers) if per_layer else [None]:
            for row in block:
                yield from _mapped(row, shape, layer)


def _mapped(row: Row, shape: ModelShape, layer: int | None) -> Iterator[MappedTensor]:
    dimensions = {
        "vocab": shape.vocab_size,
        "hidden": shape.hidden_size,
        "ffn": shape.ffn_size,
        "q": shape.num_heads * shape.head_dim,
        "kv": shape.num_kv_heads * shape.head_dim,
        "head": shape.head_dim,
    }
    weights = tuple(
        (name.format(layer), tuple(dimensions[dimension] for dimension in sizes.split()))
        for name, sizes in row.hf.items()
    )
    rows = sum(sizes[0] for _, sizes in weights)
    rest = weights[0][1][1:]
    stack, index, one = ((), (), ()) if layer is None else ((shape.num_layers,), (layer,), (1,))
    global_shape = (*stack, rows, *rest)
    if row.per_group:
        offset = (*index, *[0] * (1 + len(rest)))
        yield MappedTensor(row.megatron, global_shape, offset, (*one, rows, *rest), weights, groups=shape.num_kv_heads)
        return
    start = 0
    for name, sizes in weights:
        offset = (*index, start, *[0] * len(rest))
        yield MappedTensor(row.megatron, global_shape, offset, (*one, *sizes), ((name, sizes),))
        start += sizes[0]


def join(mapped: MappedTensor, tensors: list[Tensor]) -> Tensor:
    """The Megatron tensor of `mapped.shape` from its Hugging Face tensors, in the order of `mapped.hf`."""
    if not mapped.groups:
        return tensors[0].reshape(mapped.shape)
    import torch

    # Query heads that share a key head are neighbours in Hugging Face's q_proj too: a group is one block of rows.
    blocks = [tensor.reshape(mapped.groups, -1, *tensor.shape[1:]) for tensor in tensors]
    return torch.cat(blocks, dim=1).reshape(mapped.shape)


def split(mapped: MappedTensor, tensor: Tensor) -> list[Tensor]:
    """The Hugging Face tensors, in the order of `mapped.hf`, from the Megatron tensor: the inverse of `join`."""
    if not mapped.groups:
        return [tensor.reshape(mapped.hf[0][1])]
    rows = [sizes[0] // mapped.groups for _, sizes in mapped.hf]
    grouped = tensor.reshape(mapped.groups, sum(rows), *mapped.hf[0][1][1:])
    blocks = grouped.split(rows, dim=1)
    return [block.reshape(sizes) for block, (_, sizes) in zip(blocks, mapped.hf, strict=True)]


def spans(mapped: MappedTensor, first: int, last: int) -> Iterator[tuple[str, int, int, int]]:
    """Of which rows the tensor's rows first..last-1 are made: (weight, its first row, how many, where in the tensor).

    The same map as `join`, for those who want a few rows without reading the rest.
    """
    groups = max(mapped.groups, 1)
    blocks = [sizes[0] // groups for _, sizes in mapped.hf]
    row = 0
    for group in range(groups):
        for (name, _), count in zip(mapped.hf, blocks, strict=True):
            begin, end = max(row, first), min(row + count, last)
            if begin < end:
                yield name, group * count + begin - row, end - begin, begin
            row += count
