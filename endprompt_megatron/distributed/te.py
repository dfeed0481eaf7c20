"""What Transformer Engine needs outside its layers: environment variables and shared buffers.

The layers are built in model/llama.py; config/constraints/precision_rules.py says what is legal.
"""

import os
import sys

from endprompt_megatron.config.recipe import Recipe
from endprompt_megatron.distributed.environment import refuse_others
from endprompt_megatron.distributed.hardware import Hardware, here
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
    kinds = [bool(recipe.precision.fp8)]
    if recipe.precision.fp8 and recipe.precision.bf16_edge_layers:
        kinds.append(False)
    hopper = here().gpu is not None and here().gpu.hopper
    base.initialize_ub(
        shape=[recipe.context.physical * recipe.train.micro_batch_size // p.context, shape.hidden_size],
        tp_size=p.tensor,
        quantization_modes=[modes.FP8 if fp8 else modes.NONE for fp8 in kinds],
        ub_cfgs=[overlap_settings(shape, fp8) if hopper else {} for fp8 in kinds],
        bootstrap_backend="nccl",
    )


def overlap_settings(shape: ModelShape, fp8: bool) -> dict[str, dict]:
    """How each matrix product shares an H100's SMs with the traffic that it hides, by Transformer Engine's names.

    NVIDIA's values for 70B and 405B at 8,192 tokens (Megatron-Bridge 0.6, training/comm_overlap.py).  Transformer
    Engine's own take 16 SMs for every bulk transfer, and a margin.
    """
    large = shape.hidden_size > 8192
    bulk = {"qkv_dgrad": 2 if large else 4, "qkv_wgrad": 24, "fc1_dgrad": 2, "fc1_wgrad": 2 if large else 4}
    settings = {
        name: {"method": "bulk", "num_sm": count, "cga_size": 2, "set_sm_margin": False} for name, count in bulk.items()
    }
    for name in ("qkv_fprop", "proj_dgrad", "fc1_fprop", "fc2_dgrad"):
        settings[name] = {"method": "ring_exchange", "aggregate": False}
    for name, count in (("proj_fprop", 24), ("fc2_fprop", 8 if large else 16)):
        ring = {"method": "ring_exchange", "num_sm": 1, "cga_size": 1, "set_sm_margin": True}
        pipeline = {"method": "pipeline", "num_sm": count, "cga_size": 2, "num_splits": 4, "set_sm_margin": True}
        settings[name] = ring if fp8 else pipeline
    return settings
