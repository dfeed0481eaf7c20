"""Which precisions are legal on which GPU and for which shape: what Transformer Engine would refuse later.

Transformer Engine finds most of these in its first forward pass, and for some it silently runs something else.  Read
from the sources of 2.9 to 2.13.
"""

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.config.recipe import Recipe
from endprompt_megatron.distributed.hardware import Hardware
from endprompt_megatron.model.shape import ModelShape

OLDEST_TE = (2, 9)
# What a tensor's dimensions should be multiples of: (all but the last together, the last).
_MULTIPLES = {"delayed": (8, 16), "tensorwise": (8, 16), "blockwise": (128, 128), "mxfp8": (32, 32)}


def check_precision(recipe: Recipe, where: str, shape: ModelShape, hardware: Hardware) -> None:
    """Raise InputError for what cannot run in this precision; the line gives the reason and the nearest legal one."""
    p = recipe.precision
    if p.grad_reduce == "bfloat16" and p.dtype == "float32":
        raise InputError(
            f"{where}: precision.grad_reduce=bfloat16 with dtype=float32: gradients of float32 weights stay float32; "
            "use float32"
        )
    te = hardware.te
    if hardware.gpu is not None and te is not None and te < OLDEST_TE:
        found = ".".join(map(str, te))
        raise InputError(f"{where}: Transformer Engine {found} is installed: 2.9 or later is needed, or none at all")
    if recipe.optim.moments_dtype != "float32" and (te is None or hardware.gpu is None):
        raise InputError(
            f"{where}: optim.moments_dtype={recipe.optim.moments_dtype} needs Transformer Engine's fused AdamW on a "
            "GPU: use float32 here"
        )
    if p.fp8 is None:
        if p.fp8_attention:
            raise InputError(f"{where}: precision.fp8_attention=true needs precision.fp8, such as hybrid")
        if p.bf16_edge_layers:
            raise InputError(
                f"{where}: precision.bf16_edge_layers={p.bf16_edge_layers} keeps layers out of FP8, and precision.fp8 "
                "is not set: use 0"
            )
        return
    _check_machine(recipe, where, hardware)
    if p.dtype == "float32":
        raise InputError(f"{where}: precision.fp8={p.fp8} computes in BF16 around its FP8: use dtype=bfloat16")
    _check_edges(recipe, where, shape)
    _check_dimensions(recipe, where, shape)
    if p.fp8_attention:
        _check_attention(recipe, where, shape, hardware)


def _check_machine(recipe: Recipe, where: str, hardware: Hardware) -> None:
    p = recipe.precision
    if hardware.te is None:
        raise InputError(f"{where}: precision.fp8={p.fp8} needs Transformer Engine, which is not installed: use null")
    if hardware.gpu is None:
        raise InputError(f"{where}: precision.fp8={p.fp8} needs a GPU (Hopper or later), and there is none: use null")
    gpu, capability = hardware.gpu.name, hardware.gpu.capability
    if capability < (8, 9):
        raise InputError(f"{where}: precision.fp8={p.fp8}: an {gpu} has no FP8 (Hopper has): use null, which is BF16")
    if p.fp8_recipe == "mxfp8" and capability < (10, 0):
        raise InputError(
            f"{where}: precision.fp8_recipe=mxfp8 needs Blackwell, this is an {gpu}: use blockwise, tensorwise or "
            "delayed"
        )
    if p.fp8_recipe == "blockwise" and capability < (9, 0):
        raise InputError(
            f"{where}: precision.fp8_recipe=blockwise needs Hopper, this is an {gpu}: use tensorwise or delayed"
        )


def _check_edges(recipe: Recipe, where: str, shape: ModelShape) -> None:
    p = recipe.precision
    if not p.bf16_edge_layers:
        return
    if p.fp8_recipe == "delayed":
        raise InputError(
            f"{where}: precision.bf16_edge_layers={p.bf16_edge_layers} with fp8_recipe=delayed: its scales are updated "
            "once for all layers, in FP8 or not; use tensorwise, or 0"
        )
    max_layers = shape.num_layers // recipe.parallel.pipeline
    if p.bf16_edge_layers > max_layers:
        raise InputError(
            f"{where}: precision.bf16_edge_layers={p.bf16_edge_layers} is more than the {max_layers} layers of a stage"
        )


def _check_dimensions(recipe: Recipe, where: str, shape: ModelShape) -> None:
    """Every matrix that is multiplied in FP8, as a tensor-parallel rank holds it."""
    p, tensor = recipe.parallel, recipe.parallel.tensor
    kind = recipe.precision.fp8_recipe
    rows, columns = _MULTIPLES[kind]
    qkv = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim // tensor
    matrices = {  # (outputs, inputs)
        "hidden_size": (shape.hidden_size, shape.hidden_size),
        "query, key and value": (qkv, shape.hidden_size),
        "attention output": (shape.hidden_size, shape.num_heads * shape.head_dim // tensor),
        "intermediate_size": (2 * shape.ffn_size // tensor, shape.ffn_size // tensor),
    }
    for what, (outputs, inputs) in matrices.items():
        # The outputs are the last dimension of the gradient, so both sides keep to the larger multiple.
        for size in (outputs, inputs):
            if size % columns:
                raise InputError(
                    f"{where}: precision.fp8_recipe={kind} wants dimensions in multiples of {columns}, and {what} is "
                    f"{size} with parallel.tensor={tensor}: use a smaller parallel.tensor, or precision.fp8=null"
                )
    tokens = recipe.context.physical * recipe.train.micro_batch_size // p.context
    if p.sequence:
        tokens //= tensor
    if tokens % rows:
        raise InputError(
            f"{where}: precision.fp8_recipe={kind} wants the tokens of a rank in multiples of {rows}, and "
            f"context.physical={recipe.context.physical} leaves it {tokens}: make context.physical a multiple of "
            f"{rows * p.context * (tensor if p.sequence else 1)}"
        )


def _check_attention(recipe: Recipe, where: str, shape: ModelShape, hardware: Hardware) -> None:
    p, parallel = recipe.precision, recipe.parallel
    asked = f"{where}: precision.fp8_attention=true"
    blackwell = hardware.gpu is not None and hardware.gpu.blackwell
    if shape.head_dim > 128 or shape.head_dim % 16 or (shape.head_dim != 128 and not blackwell):
        legal = "at most 128, in multiples of 16" if blackwell else "128 alone"
        raise InputError(
            f"{asked} trains with head_dim={legal}, this model has {shape.head_dim}: use false (GEMMs stay FP8)"
        )
    if p.fp8_recipe in ("blockwise", "mxfp8"):
        raise InputError(
            f"{asked} with fp8_recipe={p.fp8_recipe}: Transformer Engine has FP8 attention for per-tensor scaling "
            "only; use tensorwise or delayed, or fp8_attention=false"
        )
    if recipe.data.packing == "documents":
        raise InputError(
            f"{asked} with data.packing=documents: there is no FP8 attention over packed sequences; use stream, or "
            "fp8_attention=false"
        )
    if recipe.train.deterministic:
        raise InputError(
            f"{asked} with train.deterministic=true: cuDNN's FP8 attention adds up gradients in any order; use false"
        )
    if parallel.recompute == "selective":
        raise InputError(
            f"{asked} with parallel.recompute=selective: attention alone would be recomputed in BF16 and its "
            "gradients be those of another function; use full, block or none"
        )
    if parallel.context > 1 and parallel.context_comm == "all_gather":
        raise InputError(f"{asked} with parallel.context_comm=all_gather: not in FP8; use p2p or a2a")
    if hardware.gpu is not None and hardware.gpu.capability < (9, 0):
        raise InputError(f"{asked} needs Hopper, this is an {hardware.gpu.name}: use false")
