"""What context.rope may ask of a model that has a RoPE of its own."""

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.config.recipe import ROPE_KNOBS, Recipe
from endprompt_megatron.method.rope_parameters import scaled
from endprompt_megatron.model.shape import ModelShape


def check_rope(recipe: Recipe, where: str, shape: ModelShape) -> None:
    """Raise InputError for a scaling that cannot be put on the model's own, and for keys that it does not take."""
    c, rope = recipe.context, recipe.context.rope
    if shape.head_dim % 2:
        raise InputError(f"{where}: head_dim={shape.head_dim} of {recipe.model.hf} is odd; RoPE needs pairs")
    if rope.type != "none" and rope.factor < 1:
        raise InputError(f"{where}: context.rope.factor={rope.factor} should be at least 1 (target / original)")
    for name, value in rope.knobs.items():
        if name not in ROPE_KNOBS.get(rope.type, ()):
            takers = " or ".join(kind for kind, names in ROPE_KNOBS.items() if name in names)
            raise InputError(f"{where}: context.rope.{name}={value} belongs to {takers}, not to type={rope.type}")
    if rope.type == "keep" and rope.theta is not None:
        raise InputError(f"{where}: context.rope.theta={rope.theta} with type=keep: the model's RoPE stays as it is")
    if rope.type == "longrope" and rope.long_factor is None:
        raise InputError(
            f"{where}: context.rope.long_factor is missing: LongRoPE needs {shape.head_dim // 2} numbers, one for each "
            "pair of dimensions"
        )
    if (rope.beta_fast or 32) <= (rope.beta_slow or 1):
        raise InputError(
            f"{where}: context.rope.beta_fast={rope.beta_fast or 32} should be above beta_slow={rope.beta_slow or 1}"
        )
    kind = scaled(shape.rope, c.scaling, where)
    if not kind.follows_length:
        return
    said = f"context.rope.type={rope.type}" if rope.type == kind.type else f"the {kind.type} RoPE of {recipe.model.hf}"
    if recipe.data.packing == "documents":
        raise InputError(
            f"{where}: data.packing=documents with {said}: its frequencies follow the length of one input, and a row "
            "holds several; use another scaling such as ntk, or packing=stream"
        )
    if recipe.parallel.context > 1:
        raise InputError(
            f"{where}: {said} takes its frequencies from the longest position, which ranks of parallel.context see "
            "parts of: use parallel.context=1, or another scaling such as ntk"
        )
