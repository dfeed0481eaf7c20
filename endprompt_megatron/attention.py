"""Core attention and RMSNorm for where Transformer Engine is absent: on a CPU, or a GPU without TE.

Both fit the slots of Megatron's layer spec.  The attention calls torch's scaled_dot_product_attention,
which never materialises the score matrix; Megatron's own DotProductAttention does.  Under context
parallelism each rank gathers all keys and values and attends to them from its own queries.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right


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
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query [s, b, h, d], key and value [s, b, kv heads, d] -> [s, b, h * d].

        Under context parallelism all are this rank's zigzag shares of the sequence.
        """
        length, batch, heads, _ = query.shape
        if self.group.size() > 1:
            key, value = GatherSequence.apply(torch.cat((key, value), -1), self.group).chunk(2, -1)
        if key.shape[2] != heads:
            key = key.repeat_interleave(heads // key.shape[2], dim=2)
            value = value.repeat_interleave(heads // value.shape[2], dim=2)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        context = self._whole(query, key, value) if self.group.size() == 1 else self._share(query, key, value)
        return context.permute(2, 0, 1, 3).reshape(length, batch, -1)

    def _whole(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=self.causal, scale=self.softmax_scale)

    def _share(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of this rank's two chunks of the sequence, each to the keys up to its own end."""
        rank, half = self.group.rank(), query.shape[2] // 2
        parts = []
        for queries, chunk in zip(query.split(half, 2), (rank, 2 * self.group.size() - 1 - rank), strict=True):
            seen = (chunk + 1) * half
            mask = causal_lower_right(half, seen)
            parts.append(
                F.scaled_dot_product_attention(
                    queries, key[:, :, :seen], value[:, :, :seen], attn_mask=mask, scale=self.softmax_scale
                )
            )
        return torch.cat(parts, 2)


class GatherSequence(torch.autograd.Function):
    """The whole sequence from the ranks' zigzag shares: [s / ranks, ...] -> [s, ...], in physical order.

    Backward, the gradients that the ranks have for each share are summed and sent to its owner.
    """

    @staticmethod
    def forward(ctx: Any, share: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        shares = share.new_empty(group.size() * share.shape[0], *share.shape[1:])
        dist.all_gather_into_tensor(shares, share.contiguous(), group=group)
        shares = shares.unflatten(0, (group.size(), 2, -1))
        # Rank r holds chunks r and 2 * ranks - 1 - r.
        return torch.cat((shares[:, 0], shares[:, 1].flip(0))).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        size = ctx.group.size()
        chunks = upstream.unflatten(0, (2 * size, -1))
        shares = torch.stack((chunks[:size], chunks[size:].flip(0)), 1).flatten(0, 2)
        gradient = shares.new_empty(upstream.shape[0] // size, *upstream.shape[1:])
        dist.reduce_scatter_tensor(gradient, shares, group=ctx.group)
        return gradient, None


class RMSNorm(torch.nn.Module):
    """RMSNorm as LLaMA computes it, in float32 inside, that knows about sequence parallelism.

    Megatron sums the gradients of parameters marked `sequence_parallel` over the tensor-parallel ranks,
    each of which saw only its part of the sequence.
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
