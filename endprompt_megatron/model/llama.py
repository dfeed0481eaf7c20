"""LLaMA as a Megatron-Core GPTModel, built from the shape that an HF config gives.

The layer spec is Transformer Engine's where TE is importable, otherwise Megatron's local one with the
attention and the norm of attention.py.  How the model is parallelised is in the TransformerConfig and nowhere else.
"""

import functools
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_defaults_if_not_set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from endprompt_megatron.config.recipe import LongLora, Parallel, Precision, Recipe
from endprompt_megatron.distributed.hardware import has_transformer_engine
from endprompt_megatron.distributed.runtime import device_options
from endprompt_megatron.method.rope import PositionRotary, transformers_config
from endprompt_megatron.model.attention import RMSNorm, SdpaAttention
from endprompt_megatron.model.cross_entropy import vocab_cross_entropy
from endprompt_megatron.model.lora import (
    Fc1Adapter,
    Fc2Adapter,
    ProjAdapter,
    QkvAdapter,
    start_adapters,
    with_adapter,
)
from endprompt_megatron.model.packed_sequences import packed_attention, packed_sequences
from endprompt_megatron.model.shape import ModelShape
from endprompt_megatron.model.shifted_attention import shifted_attention

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def transformer_config(
    shape: ModelShape,
    parallel: Parallel,
    precision: Precision,
    *,
    shared_positions: bool,
    attention_factor: float = 1.0,
    deterministic: bool = False,
) -> TransformerConfig:
    """Megatron's config for this shape and these sections of a recipe.  `shared_positions`: see build_chunks.

    YaRN multiplies cos and sin by an attention factor; scores then carry its square.  It goes into the
    softmax scale, which is the same product and leaves fused RoPE usable.
    """
    dtype = DTYPES[precision.dtype]
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        qk_layernorm=shape.qk_norm,
        add_qkv_bias=shape.qkv_bias,  # other biases: layer_spec, since Megatron would have all of them or none
        hidden_dropout=0.0,
        attention_dropout=0.0,
        softmax_scale=shape.head_dim**-0.5 * attention_factor**2,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        perform_initialization=False,  # weights come from a checkpoint, always
        calculate_per_token_loss=True,  # loss.py normalises over the global batch; Megatron divides by nothing
        **_parallel(parallel),
        **_recompute(parallel),
        **_fp8(precision),
        **_fusions(shared_positions, deterministic),
    )


def _parallel(p: Parallel) -> dict[str, Any]:
    virtual = p.virtual_pipeline if p.virtual_pipeline and p.virtual_pipeline > 1 else None
    return dict(
        tensor_model_parallel_size=p.tensor,
        pipeline_model_parallel_size=p.pipeline,
        virtual_pipeline_model_parallel_size=virtual,
        account_for_embedding_in_pipeline_split=p.count_embedding,
        account_for_loss_in_pipeline_split=p.count_loss,
        context_parallel_size=p.context,
        cp_comm_type=p.context_comm,
        sequence_parallel=p.sequence,
        tp_comm_overlap=p.overlap_tensor,
        deallocate_pipeline_outputs=True,
        **device_options(virtual_pipeline=virtual is not None),
    )


def _recompute(p: Parallel) -> dict[str, Any]:
    if p.recompute == "selective":
        return dict(recompute_granularity="selective", recompute_modules=["core_attn"])
    if p.recompute == "none":
        return {}
    return dict(
        recompute_granularity="full",
        recompute_method="block" if p.recompute == "block" else "uniform",
        recompute_num_layers=p.recompute_layers or 1,
    )


def _fp8(p: Precision) -> dict[str, Any]:
    if p.fp8 is None:
        return {}
    return dict(
        fp8=p.fp8,
        fp8_recipe=p.fp8_recipe,
        fp8_dot_product_attention=p.fp8_attention,
        # Delayed scaling as NVIDIA trains LLaMA with it: the largest value of the last 1024 steps.
        fp8_amax_history_len=1024 if p.fp8_recipe == "delayed" else 1,
        fp8_amax_compute_algo="max" if p.fp8_recipe == "delayed" else "most_recent",
        first_last_layers_bf16=p.bf16_edge_layers > 0,
        num_layers_at_start_in_bf16=p.bf16_edge_layers,
        num_layers_at_end_in_bf16=p.bf16_edge_layers,
    )


def _fusions(shared_positions: bool, deterministic: bool) -> dict[str, Any]:
    """Kernels that do several steps at once.  All need Transformer Engine; the loss is cross_entropy.py's."""
    te = has_transformer_engine()
    return dict(
        bias_activation_fusion=te,
        masked_softmax_fusion=te,
        persist_layer_norm=te,
        deterministic_mode=deterministic,
        # TE's fused kernel takes one row of rotary angles for the micro-batch, which packed documents are too.
        apply_rope_fusion=te and shared_positions,
        # Megatron refuses it without Apex, which only the output layer needs: `_fuse_weight_gradients` does the rest.
        gradient_accumulation_fusion=te and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
    )


def layer_spec(
    shape: ModelShape, config: TransformerConfig, vp_stage: int | None, longlora: LongLora
) -> TransformerBlockSubmodules | ModuleSpec:
    """Layer spec of this pipeline stage: TE's, or ours where TE is absent (the same checkpoint names)."""
    if has_transformer_engine():
        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=shape.qk_norm)
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = packed_attention(attention.core_attention)
        if longlora.rank:
            _take_norms_out(layer, longlora)
        _replace_layers(layer, shape, longlora)
        return layer
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = SdpaAttention
    if shape.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    _replace_layers(layer, shape, longlora)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=RMSNorm)


def _replace_layers(layer: ModuleSpec, shape: ModelShape, longlora: LongLora) -> None:
    """In the spec, replace the layers that have a bias in this model, or an adapter or groups in this recipe."""
    attention, mlp = layer.submodules.self_attention.submodules, _mlp_of(layer)
    if shape.proj_bias:
        attention.linear_proj = _with_bias(attention.linear_proj)
    if shape.mlp_bias:
        mlp.linear_fc1, mlp.linear_fc2 = _with_bias(mlp.linear_fc1), _with_bias(mlp.linear_fc2)
    if longlora.rank:
        attention.linear_qkv = with_adapter(attention.linear_qkv, QkvAdapter, longlora)
        attention.linear_proj = with_adapter(attention.linear_proj, ProjAdapter, longlora)
    if longlora.rank and longlora.mlp:
        mlp.linear_fc1 = with_adapter(mlp.linear_fc1, Fc1Adapter, longlora)
        mlp.linear_fc2 = with_adapter(mlp.linear_fc2, Fc2Adapter, longlora)
    if longlora.shifted:
        # torch's flash attention, with Transformer Engine too: groups are rows of a batch to it.
        attention.core_attention = shifted_attention(longlora.groups)


def _mlp_of(layer: ModuleSpec) -> MLPSubmodules:
    """The MLP's layers in the spec: Megatron-Core 0.16 has a spec there, 0.19 a partial of the module."""
    mlp = layer.submodules.mlp
    return mlp.keywords["submodules"] if isinstance(mlp, functools.partial) else mlp.submodules


def _take_norms_out(layer: ModuleSpec, longlora: LongLora) -> None:
    """In TE's spec, the norm before a matrix with adapters as a separate layer: they take its output."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm

    layer.submodules.input_layernorm = TENorm
    layer.submodules.self_attention.submodules.linear_qkv = TEColumnParallelLinear
    names = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if longlora.mlp:
        layer.submodules.pre_mlp_layernorm = TENorm
        _mlp_of(layer).linear_fc1 = TEColumnParallelLinear
        names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    layer.submodules.sharded_state_dict_keys_map = {**layer.submodules.sharded_state_dict_keys_map, **names}


def _with_bias(linear: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """The same linear layer, with a bias whatever it is asked for."""

    class WithBias(linear):
        def __init__(self, *args: Any, bias: bool, **kwargs: Any) -> None:
            super().__init__(*args, bias=True, **kwargs)

    return WithBias


class LlamaModel(GPTModel):
    """GPTModel that rotates by explicit position ids and whose padded vocabulary takes no probability."""

    def __init__(self, shape: ModelShape, hf_config: Any, config: TransformerConfig, **kwargs: Any) -> None:
        vocab = shape.padded_vocab(config.tensor_model_parallel_size)
        super().__init__(
            config=config,
            vocab_size=vocab,
            max_sequence_length=hf_config.max_position_embeddings,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=shape.tied_embeddings,
            **kwargs,
        )
        self.rotary_pos_emb = PositionRotary(hf_config, shape.head_dim)
        _mark_tensor_parallel(self)
        share = vocab // config.tensor_model_parallel_size
        start = share * parallel_state.get_tensor_model_parallel_rank()
        self.true_vocab_on_this_rank = min(max(shape.vocab_size - start, 0), share)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Per-token loss [b, s] float32 on the last stage if `labels` are given, otherwise its logits [b, s, v].

        input_ids, labels [b, s] int64; position_ids [b or 1, s] int64, needed on every pipeline stage, and so is
        cu_seqlens: for packed rows, b = 1, where each sequence begins (batches.py).
        """
        self.rotary_pos_emb.position_ids = position_ids
        if cu_seqlens is not None:
            kwargs["packed_seq_params"] = packed_sequences(cu_seqlens, input_ids)
        return super().forward(input_ids, position_ids, attention_mask=None, labels=labels, **kwargs)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross entropy [b, s] over the true vocabulary.  logits [s, b, v / tensor parallel], labels [b, s]."""
        loss = vocab_cross_entropy(logits, labels.t(), self.true_vocab_on_this_rank, self.pg_collection.tp)
        return loss.t().contiguous()

    def without_padding(self, logits: Tensor) -> Tensor:
        """The logits [.., .., v / tensor parallel], in place, with no probability for padded vocabulary."""
        if self.true_vocab_on_this_rank < logits.shape[-1]:
            logits[..., self.true_vocab_on_this_rank :] = torch.finfo(logits.dtype).min
        return logits


def _mark_tensor_parallel(model: torch.nn.Module) -> None:
    """Mark the weights that tensor-parallel ranks hold shards of, which Megatron does only when it initialises them.

    Unmarked, they would count on the first rank only and the gradient norm would miss the others' shards.
    """
    for module in model.modules():
        if not isinstance(module, VocabParallelEmbedding | ColumnParallelLinear | RowParallelLinear):
            continue
        if module.weight is not None:
            set_defaults_if_not_set_tensor_model_parallel_attributes(module.weight)
            module.weight.tensor_model_parallel = True
            module.weight.partition_dim = 1 if isinstance(module, RowParallelLinear) else 0


def build_model(
    shape: ModelShape, recipe: Recipe, export_config: dict, *, shared_positions: bool = False
) -> list[LlamaModel]:
    """`build_chunks` of what a recipe trains; `shared_positions`: all its samples have the same position ids."""
    one_sequence = recipe.train.micro_batch_size == 1 or recipe.data.packing == "documents"
    return build_chunks(
        shape,
        export_config,
        recipe.parallel,
        recipe.precision,
        recipe.longlora,
        shared_positions=one_sequence or shared_positions,
        seed=recipe.train.seed,
        deterministic=recipe.train.deterministic,
    )


def build_chunks(
    shape: ModelShape,
    export_config: dict,
    parallel: Parallel,
    precision: Precision,
    longlora: LongLora,
    *,
    shared_positions: bool,
    seed: int = 0,
    deterministic: bool = False,
) -> list[LlamaModel]:
    """This rank's model chunks (one, or one a virtual pipeline stage), on the CPU or the GPU.

    Weights are not set, but for LoRA's adapters, by `seed`: no checkpoint that training starts from has any.

    `export_config` is the HF config that will be exported (resolve.config_to_export).  `shared_positions`: every
    micro-batch comes with one row of position ids, [1, s].  Needs parallel_state.
    """
    from endprompt_megatron.method.rope import frequencies

    hf_config = transformers_config(export_config)
    _, attention_factor = frequencies(hf_config)
    config = transformer_config(
        shape,
        parallel,
        precision,
        shared_positions=shared_positions,
        attention_factor=attention_factor,
        deterministic=deterministic,
    )
    chunks = config.virtual_pipeline_model_parallel_size
    models = []
    for stage in range(chunks or 1):
        vp_stage = stage if chunks else None
        model = LlamaModel(
            shape,
            hf_config,
            config,
            transformer_layer_spec=layer_spec(shape, config, vp_stage, longlora),
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            vp_stage=vp_stage,
        )
        if longlora.rank:
            start_adapters(model, longlora, seed)
        _fuse_weight_gradients(model)
        models.append(model)
    return models


def _fuse_weight_gradients(model: torch.nn.Module) -> None:
    """In Transformer Engine's layers, add weight gradients to their float32 sum inside the GEMM, without Apex."""
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True
