"""LoRA on the matrices of attention, and of the MLP (arXiv 2106.09685), and what is trained beside it (LongLoRA).

An adapter is a low-rank product that is added to a frozen matrix's output: y + alpha / rank * B A x.  Queries, keys
and values are one matrix here, as gate and up are, and have an adapter each, so that the product can be added to each
of Hugging Face's matrices (lora_merge.py).  Tensor-parallel ranks exchange A x, which has `rank` columns, and nothing
wider.
"""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import Parameter

from endprompt_megatron.config.recipe import LongLora
from endprompt_megatron.model.longlora import ADAPTER


class Adapter(torch.nn.Module):
    """What all kinds share: the names of their matrices, how ranks split them, how training starts.

    `split` names the matrices that tensor-parallel ranks split, and the axis; the others are complete on each of them.
    """

    split: ClassVar[dict[str, int]]

    def __init__(self, config: TransformerConfig, longlora: LongLora) -> None:
        super().__init__()
        self.config, self.rank, self.scale = config, longlora.rank, longlora.alpha / longlora.rank

    def matrix(self, rows: int, columns: int, *, split: int | None, by_token: bool = False) -> Parameter:
        """A matrix, not set.  split: the axis that ranks split.  by_token: with sequence parallelism each rank has
        the gradient of its own tokens only, and Megatron sums them."""
        shape = [rows, columns]
        if split is not None:
            shape[split] //= self.config.tensor_model_parallel_size
        device = torch.cuda.current_device()
        parameter = Parameter(torch.empty(shape, dtype=self.config.params_dtype, device=device))
        parameter.tensor_model_parallel = split is not None
        parameter.partition_dim = -1 if split is None else split
        parameter.partition_stride = 1
        parameter.sequence_parallel = by_token and self.config.sequence_parallel
        return parameter

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """As published: A uniform within 1 / sqrt(its inputs), B zero; the same whatever the layout."""
        for name, parameter in self.named_parameters():
            if name != "down":
                parameter.zero_()
                continue
            shape, axis = list(parameter.shape), self.split.get("down")
            if axis is not None:
                shape[axis] *= self.config.tensor_model_parallel_size
            bound = 1 / math.sqrt(shape[1])
            complete = torch.empty(shape).uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
            if axis is not None:
                complete = complete.chunk(self.config.tensor_model_parallel_size, axis)[
                    parallel_state.get_tensor_model_parallel_rank()
                ]
            parameter.copy_(complete)

    def add(self, output: Tensor, low: Tensor, up: Tensor) -> Tensor:
        """output [s, b, out] + scale * low [s, b, r] up^T [r, out], in one product."""
        added = torch.addmm(output.flatten(0, 1), low.flatten(0, 1), up.t(), alpha=self.scale)
        return added.view_as(output)

    def sharded_state_dict(self, prefix: str, offsets: tuple, metadata: dict) -> dict:
        """Megatron's description of which shard of which tensor this rank holds."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            self.split,
            offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=metadata["dp_cp_group"],
        )


class ColumnAdapter(Adapter):
    """Beside a matrix whose outputs ranks split: the A's of Hugging Face's n matrices in it stacked, [n r, hidden], and
    their B's for this rank's outputs."""

    def __init__(self, config: TransformerConfig, longlora: LongLora, outputs: tuple[int, ...], groups: int) -> None:
        """`outputs` of each of the matrices, in the order of `split`, and the blocks that each is dealt out by."""
        super().__init__(config, longlora)
        self.groups = groups // config.tensor_model_parallel_size or 1
        self.down = self.matrix(len(outputs) * self.rank, config.hidden_size, split=None, by_token=True)
        for name, rows in zip(self.split, outputs, strict=True):
            self.register_parameter(name, self.matrix(rows, self.rank, split=0))

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """x [s, b, hidden], under sequence parallelism this rank's tokens; output [s, b, outputs / tensor parallel]."""
        low = F.linear(x, self.down)
        # Backward, either of them sums what the ranks' outputs ask of A x.
        if self.config.sequence_parallel:
            low = gather_from_sequence_parallel_region(low)
        else:
            low = copy_to_tensor_model_parallel_region(low)
        return self.add(output, low, self.joined())

    def joined(self) -> Tensor:
        """The B's as one matrix [outputs / tensor parallel, n r], by group: rows of the first, of the second..."""
        ups = [getattr(self, name) for name in self.split]
        padded = [
            F.pad(up, (number * self.rank, (len(ups) - 1 - number) * self.rank)).unflatten(0, (self.groups, -1))
            for number, up in enumerate(ups)
        ]
        return torch.cat(padded, 1).flatten(0, 1)


class QkvAdapter(ColumnAdapter):
    """For queries, keys and values, which lie in KV groups."""

    split: ClassVar = {"up_q": 0, "up_k": 0, "up_v": 0}

    def __init__(self, config: TransformerConfig, longlora: LongLora) -> None:
        queries, keys = (n * config.kv_channels for n in (config.num_attention_heads, config.num_query_groups))
        super().__init__(config, longlora, (queries, keys, keys), config.num_query_groups)


class Fc1Adapter(ColumnAdapter):
    """For the MLP's gate and up, which a rank holds one after the other."""

    split: ClassVar = {"up_gate": 0, "up_up": 0}

    def __init__(self, config: TransformerConfig, longlora: LongLora) -> None:
        super().__init__(config, longlora, (config.ffn_hidden_size, config.ffn_hidden_size), 1)


class RowAdapter(Adapter):
    """Beside a matrix whose inputs ranks split: A [r, inputs] for this rank's inputs, B [hidden, r]."""

    split: ClassVar = {"down": 1}

    def __init__(self, config: TransformerConfig, longlora: LongLora, inputs: int) -> None:
        super().__init__(config, longlora)
        self.down = self.matrix(self.rank, inputs, split=1)
        self.up = self.matrix(config.hidden_size, self.rank, split=None, by_token=True)

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """x [s, b, inputs / tensor parallel]; output [s, b, hidden], under sequence parallelism this rank's tokens."""
        low = F.linear(x, self.down)
        if self.config.sequence_parallel:
            low = reduce_scatter_to_sequence_parallel_region(low)
        else:
            low = reduce_from_tensor_model_parallel_region(low)
        return self.add(output, low, self.up)


class ProjAdapter(RowAdapter):
    """For attention's output."""

    def __init__(self, config: TransformerConfig, longlora: LongLora) -> None:
        super().__init__(config, longlora, config.num_attention_heads * config.kv_channels)


class Fc2Adapter(RowAdapter):
    """For the MLP's down."""

    def __init__(self, config: TransformerConfig, longlora: LongLora) -> None:
        super().__init__(config, longlora, config.ffn_hidden_size)


def with_adapter(linear: type[torch.nn.Module], adapter: type[Adapter], longlora: LongLora) -> type[torch.nn.Module]:
    """Megatron's or Transformer Engine's linear layer, with an adapter beside it, for a layer spec."""

    class Adapted(linear):
        def __init__(self, *args: Any, config: TransformerConfig, **kwargs: Any) -> None:
            super().__init__(*args, config=config, **kwargs)
            self.adapter = adapter(config, longlora)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            output, bias = super().forward(x)
            return self.adapter(x, output), bias

        def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
            found = super().sharded_state_dict(prefix, sharded_offsets, metadata)
            return found | self.adapter.sharded_state_dict(f"{prefix}adapter.", sharded_offsets, metadata)

    return Adapted


def start_adapters(model: torch.nn.Module, longlora: LongLora, seed: int) -> None:
    """Set the adapters of a model chunk, and freeze what is not trained: before DDP and the optimizer are built."""
    for layer in model.decoder.layers:
        attention, mlp = layer.self_attention, layer.mlp
        for which, linear in enumerate((attention.linear_qkv, attention.linear_proj)):
            linear.adapter.initialise((seed << 20) + 2 * layer.layer_number + which)
        for which, linear in enumerate((mlp.linear_fc1, mlp.linear_fc2) if longlora.mlp else ()):
            linear.adapter.initialise((seed << 20) + (1 << 19) + 2 * layer.layer_number + which)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_trained(name, longlora, model.share_embeddings_and_output_weights))
    if model.pre_process and not longlora.train_embeddings:
        # A recomputed layer whose input needs no gradient would leave its adapters without one.
        model.embedding.register_forward_hook(_need_gradient)


def _is_trained(name: str, longlora: LongLora, tied: bool) -> bool:
    if ADAPTER in name:
        return True
    if "norm" in name:
        return longlora.train_norms
    is_embedding = name.startswith("embedding.") or (tied and name.startswith("output_layer."))
    return is_embedding and longlora.train_embeddings


def _need_gradient(_module: torch.nn.Module, _arguments: tuple, output: Tensor) -> None:
    if torch.is_grad_enabled():
        output.requires_grad_()
