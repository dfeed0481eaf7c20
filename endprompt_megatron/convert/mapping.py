"""The one map between Hugging Face's LLaMA weights and Megatron-Core's: names, shapes, how they combine.

Both directions of the conversion read ROWS; a new family is a few more rows.  On the Megatron side the
names are those of a GPTModel's sharded state dict with homogeneous layers: all layers of one weight are
one tensor, stacked in axis 0, and the norms carry the names that Transformer Engine's fused layers give
them (the layer spec without Transformer Engine maps its own to these).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from endprompt_megatron.model.shape import ModelShape

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Row:
    """One Megatron weight and the Hugging Face weights it is made of, each with its shape.

    `hf` maps a name, with {} for the layer, to dimensions.  Several weights follow each other along axis 0,
    or, with `per_group`, are dealt out by KV group: [the group's query heads, its key head, its value head].
    """

    megatron: str
    hf: dict[str, str]
    per_group: bool = False
    only_if: str | None = None  # a property of ModelShape without which the weight does not exist

    @property
    def per_layer(self) -> bool:
        return self.megatron.startswith(LAYERS)


LAYERS = "decoder.layers."
_HF_LAYERS = "model.layers.{}."

# In the order of a Hugging Face model.
ROWS = (
    Row("embedding.word_embeddings.weight", {"model.embed_tokens.weight": "vocab hidden"}),
    Row(
        LAYERS + "self_attention.linear_qkv.weight",
        {
            _HF_LAYERS + "self_attn.q_proj.weight": "q hidden",
            _HF_LAYERS + "self_attn.k_proj.weight": "kv hidden",
            _HF_LAYERS + "self_attn.v_proj.weight": "kv hidden",
        },
        per_group=True,
    ),
    Row(
        LAYERS + "self_attention.linear_qkv.bias",
        {
            _HF_LAYERS + "self_attn.q_proj.bias": "q",
            _HF_LAYERS + "self_attn.k_proj.bias": "kv",
            _HF_LAYERS + "self_attn.v_proj.bias": "kv",
        },
        per_group=True,
        only_if="qkv_bias",
    ),
    Row(LAYERS + "self_attention.linear_proj.weight", {_HF_LAYERS + "self_attn.o_proj.weight": "hidden q"}),
    Row(
        LAYERS + "self_attention.linear_proj.bias",
        {_HF_LAYERS + "self_attn.o_proj.bias": "hidden"},
        only_if="proj_bias",
    ),
    Row(
        LAYERS + "mlp.linear_fc1.weight",
        {
            _HF_LAYERS + "mlp.gate_proj.weight": "ffn hidden",
            _HF_LAYERS + "mlp.up_proj.weight": "ffn hidden",
        },
    ),
    Row(
        LAYERS + "mlp.linear_fc1.bias",
        {_HF_LAYERS + "mlp.gate_proj.bias": "ffn", _HF_LAYERS + "mlp.up_proj.bias": "ffn"},
        only_if="mlp_bias",
    ),
    Row(LAYERS + "mlp.linear_fc2.weight", {_HF_LAYERS + "mlp.down_proj.weight": "hidden ffn"}),
    Row(LAYERS + "mlp.linear_fc2.bias", {_HF_LAYERS + "mlp.down_proj.bias": "hidden"}, only_if="mlp_bias"),
    Row(LAYERS + "self_attention.linear_qkv.layer_norm_weight", {_HF_LAYERS + "input_layernorm.weight": "hidden"}),
    Row(LAYERS + "mlp.linear_fc1.layer_norm_weight", {_HF_LAYERS + "post_attention_layernorm.weight": "hidden"}),
    Row("decoder.final_layernorm.weight", {"model.norm.weight": "hidden"}),
    Row("output_layer.weight", {"lm_head.weight": "vocab hidden"}, only_if="untied_embeddings"),
)

# Objects that a GPTModel's sharded state dict asks for beside its weights.  Only FP8 puts anything into them.
EXTRA_STATES = (
    LAYERS + "self_attention.linear_qkv._extra_state",
    LAYERS + "self_attention.linear_proj._extra_state",
    LAYERS + "mlp.linear_fc1._extra_state",
    LAYERS + "mlp.linear_fc2._extra_state",
    "decoder.final_layernorm._extra_state",
)

TIED_DUPLICATE = "lm_head.weight"  # some tied checkpoints carry it a second time under this name
EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "output_layer.weight"
PADDED = ("embedding.word_embeddings.weight", OUTPUT)  # Megatron may pad their vocabulary


@dataclass(frozen=True)
class Piece:
    """The smallest part of a Megatron weight that holds whole Hugging Face weights.

    `offset` and `shape` say which part of the global tensor `key`, of `global_shape`, this is; per-layer
    weights have the layer in axis 0.  `hf` names the Hugging Face weights with their shapes.
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


def pieces(shape: ModelShape) -> Iterator[Piece]:
    """All pieces of the model, layer by layer.  The vocabulary is not padded."""
    for per_layer, rows in itertools.groupby(ROWS, key=lambda row: row.per_layer):
        block = [row for row in rows if row.only_if is None or getattr(shape, row.only_if)]
        for layer in range(shape.num_layers) if per_layer else [None]:
            for row in block:
                yield from _row_pieces(row, shape, layer)


def _row_pieces(row: Row, shape: ModelShape, layer: int | None) -> Iterator[Piece]:
    dimensions = {
        "vocab": shape.vocab_size,
        "hidden": shape.hidden_size,
        "ffn": shape.ffn_size,
        "q": shape.num_heads * shape.head_dim,
        "kv": shape.num_kv_heads * shape.head_dim,
    }
    weights = tuple(
        (name.format(layer), tuple(dimensions[dimension] for dimension in sizes.split()))
        for name, sizes in row.hf.items()
    )
    rows = sum(sizes[0] for _, sizes in weights)
    rest = weights[0][1][1:]
    stack, index, one = ((), (), ()) if layer is None else ((shape.num_layers,), (layer,), (1,))
    whole = (*stack, rows, *rest)
    if row.per_group:
        offset = (*index, *[0] * (1 + len(rest)))
        yield Piece(row.megatron, whole, offset, (*one, rows, *rest), weights, groups=shape.num_kv_heads)
        return
    start = 0
    for name, sizes in weights:
        offset = (*index, start, *[0] * len(rest))
        yield Piece(row.megatron, whole, offset, (*one, *sizes), ((name, sizes),))
        start += sizes[0]


def join(piece: Piece, tensors: list[Tensor]) -> Tensor:
    """The Megatron tensor of `piece.shape` from its Hugging Face tensors, in the order of `piece.hf`."""
    if not piece.groups:
        return tensors[0].reshape(piece.shape)
    import torch

    # Query heads that share a key head are neighbours in Hugging Face's q_proj too: a group is one block of rows.
    blocks = [tensor.reshape(piece.groups, -1, *tensor.shape[1:]) for tensor in tensors]
    return torch.cat(blocks, dim=1).reshape(piece.shape)


def split(piece: Piece, tensor: Tensor) -> list[Tensor]:
    """The Hugging Face tensors, in the order of `piece.hf`, from the Megatron tensor: the inverse of `join`."""
    if not piece.groups:
        return [tensor.reshape(piece.hf[0][1])]
    rows = [sizes[0] // piece.groups for _, sizes in piece.hf]
    grouped = tensor.reshape(piece.groups, sum(rows), *piece.hf[0][1][1:])
    blocks = grouped.split(rows, dim=1)
    return [block.reshape(sizes) for block, (_, sizes) in zip(blocks, piece.hf, strict=True)]


def spans(piece: Piece, first: int, last: int) -> Iterator[tuple[str, int, int, int]]:
    """Of which rows the piece's rows first..last-1 are made: (weight, its first row, how many, where in the piece).

    The same map as `join`, for those who want a few rows without reading the rest.
    """
    groups = max(piece.groups, 1)
    blocks = [sizes[0] // groups for _, sizes in piece.hf]
    row = 0
    for group in range(groups):
        for (name, _), count in zip(piece.hf, blocks, strict=True):
            begin, end = max(row, first), min(row + count, last)
            if begin < end:
                yield name, group * count + begin - row, end - begin, begin
            row += count
