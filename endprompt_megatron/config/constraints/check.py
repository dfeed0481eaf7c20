"""What a recipe may not ask for: every rule that can be checked before a GPU is touched.

`check` ends in one line that names the key, the value and what would be legal.  What can be said without
the model's shape and the number of processes, load.py says when it reads the recipe.
"""

import os
from pathlib import Path

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.config.constraints.chat_rules import check_chat
from endprompt_megatron.config.constraints.context_rules import check_methods
from endprompt_megatron.config.constraints.longlora_rules import check_longlora
from endprompt_megatron.config.constraints.packing_rules import check_packing
from endprompt_megatron.config.constraints.parallel_rules import check_layout
from endprompt_megatron.config.constraints.precision_rules import check_precision
from endprompt_megatron.config.constraints.rope_rules import check_rope
from endprompt_megatron.config.load import load_recipe
from endprompt_megatron.config.recipe import Recipe
from endprompt_megatron.config.resolve import resolve
from endprompt_megatron.distributed import hardware as machine
from endprompt_megatron.distributed.hardware import Hardware
from endprompt_megatron.method.positions import MAPS
from endprompt_megatron.model.shape import ModelShape, read_shape


def load_checked(
    path: Path | str, overrides: list[str] | tuple[str, ...] = (), *, world_size: int
) -> tuple[Recipe, ModelShape]:
    """Read a recipe, resolve it against its model and check it for this machine.  Raises InputError."""
    recipe = load_recipe(path, overrides)
    return recipe, check(recipe, str(path), world_size=world_size)


def check(recipe: Recipe, where: str, *, world_size: int) -> ModelShape:
    """Resolve the recipe and refuse what cannot work here, before anything is built; returns the model's shape.

    `world_size` is the number of processes.  Raises InputError.
    """
    if not Path(recipe.model.hf).is_dir():
        raise InputError(f"{where}: model.hf={recipe.model.hf}: no such directory; give a Hugging Face checkpoint")
    shape = read_shape(recipe.model.hf)
    check_for(recipe, where, shape, world_size=world_size, hardware=machine.here())
    _check_place(recipe, where)
    return shape


def check_for(recipe: Recipe, where: str, shape: ModelShape, *, world_size: int, hardware: Hardware) -> None:
    """The same for a model of that shape on other hardware than this, no file looked at.  Raises InputError."""
    resolve(recipe, shape)
    _check_context(recipe, where, shape)
    check_packing(recipe, where, hardware)
    check_longlora(recipe, where)
    check_layout(recipe, where, shape, world_size, hardware)
    _check_training(recipe, where)
    check_precision(recipe, where, shape, hardware)


def _check_context(recipe: Recipe, where: str, shape: ModelShape) -> None:
    c = recipe.context
    if c.rope.type == "keep":
        if c.target != shape.window:
            raise InputError(
                f"{where}: context.target={c.target} with context.rope.type=keep, but the window of "
                f"{recipe.model.hf} is {shape.window}: give the extended model as model.hf, or its window as target"
            )
    elif c.target <= c.original:
        raise InputError(
            f"{where}: context.target={c.target} is not above context.original={c.original}; there is nothing to "
            "extend: use context.rope.type=keep to train a model in its own window"
        )
    if c.physical > c.target:
        raise InputError(
            f"{where}: context.physical={c.physical} is longer than context.target={c.target}; use at most the target"
        )
    check_methods(recipe, where)
    check_rope(recipe, where, shape)


def check_data(recipe: Recipe, where: str) -> None:
    """The rules of data.* and of what samples are made of.  Raises InputError."""
    d = recipe.data
    _check_content_skip(recipe, where)
    check_chat(recipe, where)
    if not d.train:
        raise InputError(f"{where}: data.train is missing; give the PREFIX that tools/prepare_data.py wrote")


def _check_training(recipe: Recipe, where: str) -> None:
    t, o, d = recipe.train, recipe.optim, recipe.data
    if o.warmup_steps < 0 or (o.warmup_steps and o.warmup_steps >= t.steps):
        raise InputError(f"{where}: optim.warmup_steps={o.warmup_steps} should be at least 0 and below {t.steps} steps")
    if len(o.betas) != 2 or not all(0 <= beta < 1 for beta in o.betas):
        raise InputError(f"{where}: optim.betas={list(o.betas)} should be two numbers in [0, 1)")
    if o.min_lr > o.lr:
        raise InputError(f"{where}: optim.min_lr={o.min_lr} is above optim.lr={o.lr}; the rate only falls")
    c = recipe.checkpoint
    if c.export_every % c.interval:
        raise InputError(
            f"{where}: checkpoint.export_every={c.export_every} should be a multiple of checkpoint.interval="
            f"{c.interval}: weights are made of checkpoints"
        )
    check_data(recipe, where)
    for key, wants in (("valid_interval", t.valid_interval > 0), ("virtual_distances", bool(t.virtual_distances))):
        if wants and d.valid is None:
            raise InputError(f"{where}: train.{key} needs data.valid: give a held-out PREFIX, or a split such as 99,1")
    c = recipe.context
    for distance in t.virtual_distances:
        if not c.physical <= distance <= c.target:
            raise InputError(
                f"{where}: train.virtual_distances={distance} should lie between context.physical={c.physical} and "
                f"context.target={c.target}"
            )


def _check_content_skip(recipe: Recipe, where: str) -> None:
    c, d = recipe.context, recipe.data
    if not c.content_skip:
        return
    if not MAPS[c.method].content_skip or c.chunks != 2:
        able = " or ".join(name for name, position_map in MAPS.items() if position_map.content_skip)
        raise InputError(
            f"{where}: context.content_skip=true is PoSE's with two chunks: context.method={c.method} with "
            f"context.chunks={c.chunks} should be {able} with 2"
        )
    if d.document_ends != "within":
        raise InputError(
            f"{where}: context.content_skip=true takes both chunks from one document: data.document_ends="
            f"{d.document_ends} should be within"
        )


def _check_place(recipe: Recipe, where: str) -> None:
    """The run's directory may be new, but something along its path must be a directory to make it in."""
    place = recipe.run_dir.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise InputError(
            f"{where}: checkpoint.dir={recipe.checkpoint.dir} cannot be made: {place} is not a directory; "
            "choose another"
        )
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"{where}: checkpoint.dir={recipe.checkpoint.dir}: {place} cannot be written; choose another")
