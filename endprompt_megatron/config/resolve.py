"""Fills in what a recipe leaves to its model: the window before the extension, and the interpolation factor."""

from pathlib import Path

from endprompt_megatron.config.load import load_recipe, set_factor
from endprompt_megatron.config.recipe import Recipe
from endprompt_megatron.model.shape import ModelShape, read_shape


def resolve(recipe: Recipe, shape: ModelShape) -> None:
    """Give context.original and context.rope.factor their values, where the recipe does not."""
    if recipe.context.original is None:
        recipe.context.original = shape.window
    set_factor(recipe.context)


def load_resolved(path: Path | str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """load_recipe, resolved against the model where its directory is here.  Raises InputError."""
    recipe = load_recipe(path, overrides)
    if Path(recipe.model.hf).is_dir():
        resolve(recipe, read_shape(recipe.model.hf))
    return recipe
