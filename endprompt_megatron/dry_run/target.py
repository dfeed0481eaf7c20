"""What a dry run is of: a recipe, checked as for GPUs, and its model, from its files or from what was published."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.files import read_json
from endprompt_megatron.config.constraints.check import check_for
from endprompt_megatron.config.load import load_recipe
from endprompt_megatron.config.recipe import Recipe
from endprompt_megatron.distributed.hardware import of_kind
from endprompt_megatron.method.rope_parameters import scaled, written
from endprompt_megatron.model.published_shapes import published_config, shape_for
from endprompt_megatron.model.shape import ModelShape
from endprompt_megatron.plan.plan import StageMemory, memory


@dataclass(frozen=True)
class Target:
    """`planned`: what the planner says of a rank of each pipeline stage, without Transformer Engine."""

    recipe: Recipe
    shape: ModelShape
    export_config: dict
    planned: list[StageMemory]


def target_of(path: str, overrides: Sequence[str], world_size: int, micro_batches: int | None = None) -> Target:
    """The recipe on H100s, with a global batch of so many micro-batches a rank, or its own.

    Raises InputError for one that is not legal, or asks for what only a GPU's layers have.
    """
    recipe = load_recipe(path, overrides)
    if micro_batches is not None:
        p = recipe.parallel
        replicas = max(1, world_size // (p.tensor * p.pipeline * p.context))
        recipe.train.global_batch_size = micro_batches * replicas * recipe.train.micro_batch_size
    shape, published = shape_for(recipe.model.hf, path)
    hf = recipe.model.hf
    config = published_config(hf) if published else read_json(Path(hf) / "config.json", "a Hugging Face config")
    check_for(recipe, path, shape, world_size=world_size, hardware=of_kind("h100"))
    for key, asked in (
        ("precision.fp8=null", recipe.precision.fp8 is not None),
        ("parallel.overlap_tensor=false", recipe.parallel.overlap_tensor),
        ("optim.moments_dtype=float32", recipe.optim.moments_dtype != "float32"),
        ("data.packing=stream", recipe.data.packing != "stream"),
    ):
        if asked:
            raise InputError(f"{path}: a dry run has none of Transformer Engine's layers: add {key}")
    export_config = written(config, scaled(shape.rope, recipe.context.scaling, path))
    return Target(recipe, shape, export_config, memory(shape, recipe, world_size, te=False))
