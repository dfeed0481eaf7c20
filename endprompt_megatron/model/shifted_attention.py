"""Shifted sparse attention, LongLoRA's (S2-Attn, arXiv 2309.12307): in training, tokens see their own group only.

The sequence is cut into groups (four, as published).  The first half of all query heads attends causally within
them; for the other half the cuts are half a group further on, so that what one half keeps apart the other joins.
Queries and keys are rotated before that, by their true positions.

The published code does this in two ways.  This is the way of its flash-attention path, which its results were
trained with: the shifted heads have a half-size group at each end.  Its other path rolls the sequence instead, so
that the last half group sees the first one, which comes before it.  The published code first gives every query head
its own copy of a key head, so the halves are those of the query heads, and a key head may serve both.  Of an odd
number of heads, which the flash path refuses, the larger half is shifted, as in the other path.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor

from endprompt_megatron.model.attention import SdpaAttention


def shifted_attention(groups: int) -> type:
    """The core attention with so many groups, for a layer spec."""

    class ShiftedAttention(SdpaAttention):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """query [s, b, h, d], key and value [s, b, kv heads, d] -> [s, b, h * d].  In evaluation all is seen."""
            if not self.training:
                return super().forward(query, key, value, *args, **kwargs)
            # The halves are of all heads, of which a tensor-parallel rank has some.
            before = parallel_state.get_tensor_model_parallel_rank() * query.shape[2]
            plain = min(max(self.config.num_attention_heads // 2 - before, 0), query.shape[2])
            return grouped(query, key, value, groups, plain, self.softmax_scale).flatten(2)

    return ShiftedAttention


def grouped(query: Tensor, key: Tensor, value: Tensor, groups: int, plain: int, scale: float) -> Tensor:
    """Causal attention within groups, shifted by half a group for the heads from `plain` on: [s, b, h, d].

    query [s, b, h, d], key and value [s, b, kv heads, d]; s a multiple of 2 x groups.  No mask is made.
    """
    length, _, heads, _ = query.shape
    if key.shape[2] != heads:
        key = key.repeat_interleave(heads // key.shape[2], dim=2)
        value = value.repeat_interleave(heads // value.shape[2], dim=2)
    group = length // groups
    half = group // 2
    found = []
    if plain:
        found.append(_within(query[:, :, :plain], key[:, :, :plain], value[:, :, :plain], group, scale))
    if plain < heads:
        stretches = (x[:, :, plain:].split((half, length - group, half)) for x in (query, key, value))
        sizes = (half, group, half)
        shifted = [_within(*qkv, size, scale) for *qkv, size in zip(*stretches, sizes, strict=True)]
        found.append(torch.cat(shifted))
    return found[0] if len(found) == 1 else torch.cat(found, 2)


def _within(query: Tensor, key: Tensor, value: Tensor, size: int, scale: float) -> Tensor:
    """Causal attention within groups of `size` tokens, which a row has as its batch: [s, b, h, d]."""
    # Row by row these are views, whatever the heads are cut from; of all rows together they would be copies.
    blocks = (x.unflatten(0, (-1, size)).permute(2, 0, 3, 1, 4) for x in (query, key, value))  # [b, groups, h, size, d]
    rows = [F.scaled_dot_product_attention(*row, is_causal=True, scale=scale) for row in zip(*blocks, strict=True)]
    return torch.stack([row.transpose(1, 2) for row in rows], 2).flatten(0, 1)
