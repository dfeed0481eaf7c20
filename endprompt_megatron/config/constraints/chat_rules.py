"""What `data.kind: chat`, training on conversations, goes together with."""

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.config.recipe import Recipe, one_of

KINDS = ("text", "chat")
LONG = ("drop", "cut")


def check_chat(recipe: Recipe, where: str) -> None:
    """Raise InputError for what conversations cannot be combined with; the line names what they can."""
    c, d = recipe.context, recipe.data
    one_of(where, "data.kind", d.kind, KINDS)
    if d.kind == "text":
        if d.long is not None:
            raise InputError(f"{where}: data.long={d.long} belongs to data.kind=chat: leave it out")
        return
    one_of(where, "data.long", d.long, LONG)
    asked = f"{where}: data.kind=chat"
    if d.packing != "documents":
        raise InputError(
            f"{asked} with data.packing={d.packing}: a conversation is a sample of its own; use packing=documents"
        )
    if c.method != "short":
        raise InputError(
            f"{asked} with context.method={c.method}: conversations have contiguous positions and no terminal prompt; "
            "use method=short"
        )
    if recipe.train.virtual_distances:
        raise InputError(
            f"{asked} with train.virtual_distances={recipe.train.virtual_distances}: the probe reads running text; "
            "leave it out"
        )
