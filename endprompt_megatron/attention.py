"""Core attention and RMSNorm for where Transformer Engine is absent: on a CPU, or a GPU without TE.

Both fit the slots of Megatron's layer spec.  The attention calls torch's scaled_dot_product_attention,
which never materialises the score matrix; Megatron's own DotProductAttention does.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class SdpaAttention(MegatronModule):
    """Causal attention in physical order; position ids never change who sees whom."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_unused: object,
    ) -> None:
        super().__init__(config=config)
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
        """query [s, b, h, d], key and value [s, b, kv heads, d] -> [s, b, h * d]."""
        sequence, batch, heads, _ = query.shape
        if key.shape[2] != heads:
            key = key.repeat_interleave(heads // key.shape[2], dim=2)
            value = value.repeat_interleave(heads // value.shape[2], dim=2)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        context = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal, scale=self.softmax_scale)
        return context.permute(2, 0, 1, 3).reshape(sequence, batch, -1)


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
