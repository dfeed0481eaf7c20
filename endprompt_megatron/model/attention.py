"""Core attention and RMSNorm for where Transformer Engine is absent: on a CPU, or a GPU without TE.

Both fit the slots of Megatron's layer spec.  The attention calls torch's scaled_dot_product_attention,
which never materialises the score matrix; Megatron's own DotProductAttention does.  A packed row is a call for
each of its sequences.  Under context parallelism each rank gathers all keys and values and attends to them from
its own queries.
"""

import itertools
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from endprompt_megatron.model.context_parallel import rank_order
from endprompt_megatron.model.packed_sequences import PackedSequences


class SdpaAttention(MegatronModule):
    """Causal attention in physical order; position ids never change who sees whom."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_unused: object,
    ) -> None:
        super().__init__(config=config)
        self.group = pg_collection.cp if pg_collection else parallel_state.get_context_parallel_group()
        self.softmax_scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5
        self.causal = attn_mask_type == AttnMaskType.causal

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> Tensor:
        """query [s, b, h, d], key and value [s, b, kv heads, d] -> [s, b, h * d].

        Under context parallelism all are this rank's zigzag shares of the sequence, or of each sequence of a packed
        row; a row has b = 1.
        """
        length, batch, heads, _ = query.shape
        ranks = self.group.size()
        bounds = packed_seq_params.bounds if packed_seq_params is not None else (0, length * ranks)
        if ranks > 1:
            order = rank_order(bounds, ranks).to(key.device)
            key, value = GatherSequence.apply(torch.cat((key, value), -1), self.group, order).chunk(2, -1)
        if key.shape[2] != heads:
            key = key.repeat_interleave(heads // key.shape[2], dim=2)
            value = value.repeat_interleave(heads // value.shape[2], dim=2)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        contexts = []
        for start, stop in itertools.pairwise(bounds):
            mine = query[:, :, start // ranks : stop // ranks]
            contexts.append(self._sequence(mine, key[:, :, start:stop], value[:, :, start:stop]))
        context = contexts[0] if len(contexts) == 1 else torch.cat(contexts, 2)
        return context.permute(2, 0, 1, 3).reshape(length, batch, -1)

    def _sequence(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One sequence: this rank's queries [b, h, s / ranks, d], each of its two chunks to the keys up to its end."""
        rank, ranks = self.group.rank(), self.group.size()
        if ranks == 1:
            return F.scaled_dot_product_attention(query, key, value, is_causal=self.causal, scale=self.softmax_scale)
        half = query.shape[2] // 2
        contexts = []
        for queries, chunk in zip(query.split(half, 2), (rank, 2 * ranks - 1 - rank), strict=True):
            seen = (chunk + 1) * half
            mask = causal_lower_right(half, seen)
            contexts.append(
                F.scaled_dot_product_attention(
                    queries, key[:, :, :seen], value[:, :, :seen], attn_mask=mask, scale=self.softmax_scale
                )
            )
        return torch.cat(contexts, 2)


class GatherSequence(torch.autograd.Function):
    """The complete row from the ranks' shares: [s / ranks, ...] -> [s, ...], in physical order.

    `order` [s] int64: where the ranks' tokens stand in the row, one rank after the other.  Backward, the gradients
    that the ranks have for each share are summed and sent to its owner.
    """

    @staticmethod
    def forward(ctx: Any, share: Tensor, group: dist.ProcessGroup, order: Tensor) -> Tensor:
        ctx.group, ctx.order = group, order
        shares = share.new_empty(group.size() * share.shape[0], *share.shape[1:])
        dist.all_gather_into_tensor(shares, share.contiguous(), group=group)
        return torch.empty_like(shares).index_copy_(0, order, shares)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        shares = upstream.index_select(0, ctx.order)
        gradient = shares.new_empty(upstream.shape[0] // ctx.group.size(), *upstream.shape[1:])
        dist.reduce_scatter_tensor(gradient, shares, group=ctx.group)
        return gradient, None, None


class RMSNorm(torch.nn.Module):
    """RMSNorm as LLaMA computes it, in float32 inside, that knows about sequence parallelism.

    Megatron sums the gradients of parameters marked `sequence_parallel` over the tensor-parallel ranks,
    each of which saw only its share of the sequence.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return _RmsNorm.apply(x, self.weight, self.eps)


class _RmsNorm(torch.autograd.Function):
    """y = w * x / sqrt(mean(x^2) + eps).  torch's own is a chain of ten operations that keeps each one's result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # [.., 1] float32
        ctx.save_for_backward(x, weight, scale)
        return torch.mul(x, scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed = torch.mul(x, scale)
        product = torch.mul(upstream, normed)
        weight_gradient = product.flatten(0, -2).sum(0)
        # dx = scale * (w dy - normed * mean(w dy normed))
        mean = (product @ weight.float())[..., None].div_(x.shape[-1])
        gradient = torch.mul(upstream.float(), weight).sub_(normed.mul_(mean)).mul_(scale)
        return gradient.to(x.dtype), weight_gradient.to(weight.dtype), None
