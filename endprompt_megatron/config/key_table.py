"""The table of recipe keys in docs/recipes.md, made from their declarations.

python -m endprompt_megatron.config.key_table docs/recipes.md
"""

from collections.abc import Mapping

from endprompt_megatron.common.generated_tables import main, markdown
from endprompt_megatron.config.keys import REQUIRED, Declared, keys_of
from endprompt_megatron.config.recipe import Recipe

MODULE = "endprompt_megatron.config.key_table"


def key_table(recipe: type = Recipe) -> str:
    """A row a key: its name, its default, whether a resumed run keeps it, what it means and takes."""
    rows = [
        [f"`{declared.dotted}`", _default(declared), _fixed(declared.key.fixed), _meaning(declared)]
        for declared in keys_of(recipe)
    ]
    return markdown(["key", "default", "on resume", "meaning"], rows)


def _default(declared: Declared) -> str:
    value = declared.default
    if value is None:
        return declared.key.unset or "none"
    if value == REQUIRED:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value}`" if isinstance(value, str) else f"{value}"


def _fixed(said: bool | str) -> str:
    return said if isinstance(said, str) else "fixed" if said else ""


def _meaning(declared: Declared) -> str:
    choices = declared.key.choices
    if not choices:
        return declared.key.meaning
    words = choices if isinstance(choices, Mapping) else dict.fromkeys(choices, "")
    said = [f"`{value}`" + (f" ({text})" if isinstance(text, str) and text else "") for value, text in words.items()]
    return f"{declared.key.meaning}. One of {', '.join(said)}"


if __name__ == "__main__":
    main(MODULE, key_table)
