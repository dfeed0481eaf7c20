"""What a recipe may not ask for: every rule that can be checked before a GPU is touched.

`check` ends in one line that names the key, the value and what would be legal.  What can be said without
the model's shape and the number of processes, config.py says when it reads the recipe.
"""

import os
from pathlib import Path

from endprompt_megatron.config import Recipe, has_transformer_engine, one_of
from endprompt_megatron.errors import InputError
from endprompt_megatron.positions import WITH_PROMPT
from endprompt_megatron.shape import ModelShape, read_shape


def check(recipe: Recipe, where: str, *, world_size: int) -> ModelShape:
    """Refuse what cannot work, before anything is built; returns the model's shape.

    `world_size` is the number of processes.  Raises InputError.
    """
    if not Path(recipe.model.hf).is_dir():
        raise InputError(f"{where}: model.hf={recipe.model.hf}: no such directory; give a Hugging Face checkpoint")
    shape = read_shape(recipe.model.hf)
    _check_context(recipe, where, shape)
    _check_layout(recipe, where, shape, world_size)
    _check_training(recipe, where)
    _check_precision(recipe, where)
    _check_place(recipe, where)
    return shape


def _check_context(recipe: Recipe, where: str, shape: ModelShape) -> None:
    c = recipe.context
    if c.target <= c.original:
        raise InputError(
            f"{where}: context.target={c.target} is not above context.original={c.original}; there is nothing to extend"
        )
    if c.physical > c.target:
        raise InputError(
            f"{where}: context.physical={c.physical} is longer than context.target={c.target}; use at most the target"
        )
    if c.method == "full" and c.physical != c.target:
        raise InputError(
            f"{where}: context.method=full trains at full length: context.physical={c.physical} should be {c.target}"
        )
    if c.method in WITH_PROMPT and not c.prompts:
        raise InputError(f"{where}: context.prompts is empty; {c.method} needs at least one, such as [EP_1]")
    if c.prompt_loss_weight < 0 or (c.method in WITH_PROMPT and c.prompt_loss_weight == 0):
        raise InputError(f"{where}: context.prompt_loss_weight={c.prompt_loss_weight} should be above 0")
    if c.rope.type not in ("none",) and c.rope.factor < 1:
        raise InputError(f"{where}: context.rope.factor={c.rope.factor} should be at least 1 (target / original)")
    if c.method in ("pose", "end_prompt_pose") and c.chunks < 2:
        raise InputError(f"{where}: context.chunks={c.chunks} should be at least 2 for {c.method}")
    if shape.head_dim % 2:
        raise InputError(f"{where}: head_dim={shape.head_dim} of {recipe.model.hf} is odd; RoPE needs pairs")


def _divisors(*numbers: int) -> str:
    """What divides all the numbers, as a sentence has it: 1, 2 or 4."""
    found = [str(d) for d in range(1, min(numbers) + 1) if all(n % d == 0 for n in numbers)]
    return " or ".join([", ".join(found[:-1]), found[-1]] if len(found) > 1 else found)


def _check_layout(recipe: Recipe, where: str, shape: ModelShape, world_size: int) -> None:
    p, c = recipe.parallel, recipe.context
    name = Path(recipe.model.hf).name
    for what, count in (("num_key_value_heads", shape.num_kv_heads), ("num_attention_heads", shape.num_heads)):
        if count % p.tensor:
            legal = _divisors(shape.num_kv_heads, shape.num_heads, shape.ffn_size)
            raise InputError(
                f"{where}: parallel.tensor={p.tensor} does not divide {what}={count} ({name}): use {legal}"
            )
    if shape.ffn_size % p.tensor:
        raise InputError(
            f"{where}: parallel.tensor={p.tensor} does not divide intermediate_size={shape.ffn_size} ({name})"
        )
    if shape.num_layers % p.pipeline:
        raise InputError(
            f"{where}: parallel.pipeline={p.pipeline} does not divide num_hidden_layers={shape.num_layers} ({name}): "
            f"use {_divisors(shape.num_layers)}"
        )
    if p.virtual_pipeline is not None and p.virtual_pipeline > 1:
        if p.pipeline == 1:
            raise InputError(f"{where}: parallel.virtual_pipeline={p.virtual_pipeline} needs parallel.pipeline above 1")
        layers = shape.num_layers // p.pipeline
        if layers % p.virtual_pipeline:
            raise InputError(
                f"{where}: parallel.virtual_pipeline={p.virtual_pipeline} does not divide the {layers} layers of a "
                f"pipeline stage: use {_divisors(layers)}"
            )
    if p.sequence and p.tensor == 1:
        raise InputError(f"{where}: parallel.sequence=true needs parallel.tensor above 1")
    if p.sequence and c.physical % (p.tensor * p.context):
        raise InputError(
            f"{where}: parallel.sequence splits context.physical={c.physical} by parallel.tensor={p.tensor}, "
            "which does not divide it"
        )
    if p.context > 1 and c.physical % (2 * p.context):
        raise InputError(
            f"{where}: context.physical={c.physical} should be a multiple of 2 x parallel.context={2 * p.context}"
        )
    if p.context > 1 and not has_transformer_engine():
        raise InputError(
            f"{where}: parallel.context={p.context} needs Transformer Engine, which is not installed: use 1"
        )
    one_of(where, "parallel.recompute", p.recompute, ("none", "selective", "full"))
    ranks = p.tensor * p.pipeline * p.context
    if world_size % ranks:
        raise InputError(
            f"{where}: parallel.tensor x pipeline x context = {ranks} does not divide the {world_size} processes "
            f"started: start a multiple of {ranks}"
        )
    replicas = world_size // ranks
    micro, batch = recipe.train.micro_batch_size, recipe.train.global_batch_size
    if batch % (micro * replicas):
        raise InputError(
            f"{where}: train.global_batch_size={batch} is not a multiple of micro_batch_size x data parallel = "
            f"{micro} x {replicas}"
        )
    micro_batches = batch // (micro * replicas)
    if p.virtual_pipeline and p.virtual_pipeline > 1 and micro_batches % p.pipeline:
        raise InputError(
            f"{where}: with parallel.virtual_pipeline the {micro_batches} micro-batches of a step should be "
            f"a multiple of parallel.pipeline={p.pipeline}"
        )


def _check_training(recipe: Recipe, where: str) -> None:
    t, o, d = recipe.train, recipe.optim, recipe.data
    one_of(where, "optim.schedule", o.schedule, ("constant", "cosine"))
    if o.warmup_steps < 0 or (o.warmup_steps and o.warmup_steps >= t.steps):
        raise InputError(f"{where}: optim.warmup_steps={o.warmup_steps} should be at least 0 and below {t.steps} steps")
    if len(o.betas) != 2 or not all(0 <= beta < 1 for beta in o.betas):
        raise InputError(f"{where}: optim.betas={list(o.betas)} should be two numbers in [0, 1)")
    if o.min_lr > o.lr:
        raise InputError(f"{where}: optim.min_lr={o.min_lr} is above optim.lr={o.lr}; the rate only falls")
    if d.packing == "documents":
        raise InputError(f"{where}: data.packing=documents is not available yet: use stream")
    one_of(where, "data.packing", d.packing, ("stream",))
    if not d.train:
        raise InputError(f"{where}: data.train is missing; give the PREFIX that tools/prepare_data.py wrote")
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


def _check_precision(recipe: Recipe, where: str) -> None:
    p = recipe.precision
    one_of(where, "precision.dtype", p.dtype, ("bfloat16", "float32"))
    if p.fp8 is not None:
        one_of(where, "precision.fp8", p.fp8, ("hybrid", "e4m3"))
        one_of(where, "precision.fp8_recipe", p.fp8_recipe, ("delayed", "tensorwise", "blockwise", "mxfp8"))
        if not has_transformer_engine():
            raise InputError(
                f"{where}: precision.fp8={p.fp8} needs Transformer Engine, which is not installed: use null"
            )
    if p.fp8_attention and p.fp8 is None:
        raise InputError(f"{where}: precision.fp8_attention=true needs precision.fp8, such as hybrid")


def _check_place(recipe: Recipe, where: str) -> None:
    """The run's directory may be new, but something along its path must be a directory to make it in."""
    if recipe.checkpoint.asynchronous:
        raise InputError(f"{where}: checkpoint.async=true is not available yet: use false")
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
