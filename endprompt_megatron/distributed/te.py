"""What Transformer Engine needs outside its layers: environment variables and shared buffers.

The layers are built in model/llama.py; config/constraints/precision_rules.py says what is legal.
"""

import os
import sys

from endprompt_megatron.config.recipe import Recipe
from endprompt_megatron.distributed.environment import refuse_others
from endprompt_megatron.distributed.hardware import Hardware
from endprompt_megatron.model.shape import ModelShape

# The scales of delayed scaling are pickled into a checkpoint, and Transformer Engine 2.18 does not load them without
# being told that the file can be trusted.  A run resumes from its own.
_PICKLES = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"


def set_environment(recipe: Recipe, where: str, hardware: Hardware) -> dict[str, str]:
    """Set the variables that the recipe needs and return them, before Transformer Engine reads them on its import.

    Raises InputError if one is already set to a value that would change the run.
    """
    if hardware.gpu is None or hardware.te is None:
        return {}
    wanted = attention_environment(recipe, hardware)
    if recipe.train.deterministic:
        wanted["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
    refuse_others(wanted, where)
    if "transformer_engine" in sys.modules and not wanted.keys() <= os.environ.keys():
        raise RuntimeError(f"Transformer Engine is imported already and will not see {wanted}")
    if recipe.precision.fp8 and recipe.precision.fp8_recipe == "delayed" and _PICKLES not in os.environ:
        wanted[_PICKLES] = "1"
    os.environ.update(wanted)
    return wanted


def attention_environment(recipe: Recipe, hardware: Hardware) -> dict[str, str]:
    """Environment variables that a legal combination needs; set them before Transformer Engine is imported.

    Hopper has no FP8 attention with current scaling: the variable keeps current scaling for the matrix products
    and gives attention delayed scaling.  Blackwell has both, so the recipe applies unchanged.
    """
    p = recipe.precision
    hopper = hardware.gpu is not None and hardware.gpu.hopper
    if p.fp8_attention and p.fp8_recipe == "tensorwise" and hopper:
        return {"NVTE_DPA_FP8_RECIPE": "DelayedScaling"}
    return {}


def share_buffers(recipe: Recipe, shape: ModelShape) -> None:
    """Allocate the user buffers through which tensor-parallel ranks exchange activations during GEMMs.

    Only for parallel.overlap_tensor.  All ranks call it, after the process groups exist and before the
    model is built.
    """
    p = recipe.parallel
    if not p.overlap_tensor:
        return
    from transformer_engine.pytorch.module import base

    modes = base.UserBufferQuantizationMode
    kinds = [modes.FP8 if recipe.precision.fp8 else modes.NONE]
    if recipe.precision.fp8 and recipe.precision.bf16_edge_layers:
        kinds.append(modes.NONE)
    base.initialize_ub(
        shape=[recipe.context.physical * recipe.train.micro_batch_size // p.context, shape.hidden_size],
        tp_size=p.tensor,
        quantization_modes=kinds,
        ub_cfgs={},
        bootstrap_backend="nccl",
    )
