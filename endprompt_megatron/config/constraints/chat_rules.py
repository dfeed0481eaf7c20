"""What `data.kind: chat`, training on conversations, can be combined with."""

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.config.recipe import Recipe
from endprompt_megatron.method.positions import MAPS


def check_chat(recipe: Recipe, where: str) -> None:
    """Raise InputError for what conversations cannot be combined with; the line names what they can."""
    c, d = recipe.context, recipe.data
    if d.kind == "text":
        if d.long is not None:
            raise InputError(f"{where}: data.long={d.long} applies only to data.kind=chat: leave it out")
        return
    asked = f"{where}: data.kind=chat"
    if d.packing != "documents":
        raise InputError(
            f"{asked} with data.packing={d.packing}: a conversation is a sample of its own; use packing=documents"
        )
    if not MAPS[c.method].plain:
        plain = " or ".join(name for name, position_map in MAPS.items() if position_map.plain)
        raise InputError(
            f"{asked} with context.method={c.method}: conversations have contiguous positions and no terminal prompt; "
            f"use method={plain}"
        )
    if recipe.train.virtual_distances:
        raise InputError(
            f"{asked} with train.virtual_distances={recipe.train.virtual_distances}: the probe reads running text; "
            "leave it out"
        )
