"""Packed rows on their way through Megatron's layers: one row [t, 1, h, d] of sequences that do not see each other.

Megatron's attention takes rows marked "thd" apart before it rotates them, and restarts positions in each sequence.
Ours have explicit position ids, so a row stays an ordinary one, with an angle for every token, up to the core
attention: SdpaAttention reads the bounds, `packed_attention` hands them to Transformer Engine.
"""

import itertools
from dataclasses import dataclass, fields
from typing import Any

from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor


@dataclass
class PackedSequences(PackedSeqParams):
    """`bounds`: where each sequence begins in the complete row, with its length at the end, as Python integers."""

    bounds: tuple[int, ...] = ()


def packed_sequences(cu_seqlens: Tensor, tokens: Tensor) -> PackedSequences:
    """What the layers need of a micro-batch's `cu_seqlens` (batches.py), int32 on the host; `tokens` [1, t].

    Under context parallelism they count the complete row, as Transformer Engine wants them.  What pads a sequence
    counts as its own: nothing real sees it, attention being causal.  So there is no padding between sequences,
    which only one of its kernels could skip.
    """
    bounds = tuple(cu_seqlens.tolist())
    starts = cu_seqlens.to(tokens.device, non_blocking=True)
    # Asked for under context parallelism; otherwise Transformer Engine would compare the two in every layer.
    padded = starts if bounds[-1] != tokens.shape[1] else None
    longest = max(stop - start for start, stop in itertools.pairwise(bounds))
    # cuDNN builds a graph for each longest sequence that it meets: powers of two are few.
    longest = 1 << (longest - 1).bit_length()
    return PackedSequences(
        cu_seqlens_q=starts,
        cu_seqlens_kv=starts,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        bounds=bounds,
    )


def packed_attention(core_attention: type) -> type:
    """Transformer Engine's core attention, as Megatron wraps it, that takes ordinary rows and packed ones."""

    class PackedAttention(core_attention):
        def forward(
            self,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            *args: Any,
            packed_seq_params: PackedSequences | None = None,
            **kwargs: Any,
        ) -> Tensor:
            """query [s, b, h, d], key and value [s, b, kv heads, d] -> [s, b, h * d]; b is 1 where packed."""
            if packed_seq_params is None:
                return super().forward(query, key, value, *args, **kwargs)
            length = query.shape[0]
            query, key, value = (x.squeeze(1) for x in (query, key, value))  # [t, h, d]
            sequences = thd(packed_seq_params)
            context = super().forward(query, key, value, *args, packed_seq_params=sequences, **kwargs)
            return context.reshape(length, 1, -1)

        def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
            """With the scales of attention in FP8, which Megatron leaves out.

            A run that resumes without them multiplies its first gradients in FP8 unscaled, and small ones are lost.
            """
            found = super().sharded_state_dict(prefix, sharded_offsets, metadata)
            if not self.config.fp8_dot_product_attention:
                return found
            return found | make_sharded_tensors_for_checkpoint(
                {"_extra_state": self.get_extra_state()},
                prefix,
                {},
                sharded_offsets,
                tp_group=parallel_state.get_tensor_model_parallel_group(),
                dp_cp_group=metadata["dp_cp_group"],
            )

    return PackedAttention


def thd(sequences: PackedSequences) -> PackedSeqParams:
    """The same as Megatron's own kind, in the form that Transformer Engine calls thd."""
    values = {field.name: getattr(sequences, field.name) for field in fields(PackedSeqParams)}
    return PackedSeqParams(**values | {"qkv_format": "thd"})
