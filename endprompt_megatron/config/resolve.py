"""Fills in what a recipe leaves to its model, and makes the config that the extended model is exported with."""

from pathlib import Path

from endprompt_megatron.common.files import read_json
from endprompt_megatron.config.load import load_recipe, set_factor
from endprompt_megatron.config.recipe import Recipe
from endprompt_megatron.method.rope_parameters import scaled, written
from endprompt_megatron.model.shape import ModelShape, read_shape


def resolve(recipe: Recipe, shape: ModelShape) -> None:
    """Give context.original and context.rope.factor their values, where the recipe does not."""
    if recipe.context.original is None:
        recipe.context.original = shape.window
    set_factor(recipe.context)


def config_of_base(recipe: Recipe) -> dict:
    """The Hugging Face config of the model that is extended.  Raises InputError."""
    return read_json(Path(recipe.model.hf) / "config.json", "a Hugging Face config")


def config_to_export(recipe: Recipe, shape: ModelShape, where: str) -> dict:
    """The Hugging Face config of the model that training by a resolved recipe gives.  Raises InputError."""
    config = config_of_base(recipe)
    return written(config, scaled(shape.rope, recipe.context.scaling, where))


def load_resolved(path: Path | str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """load_recipe, resolved against the model where its directory is here.  Raises InputError."""
    recipe = load_recipe(path, overrides)
    if Path(recipe.model.hf).is_dir():
        resolve(recipe, read_shape(recipe.model.hf))
    return recipe
