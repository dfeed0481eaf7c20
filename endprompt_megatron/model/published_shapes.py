"""Shapes of published models, for a plan made where their files are not: which model a name means.

families.py has what config.json of the published checkpoint says, as far as shape.shape_of reads it.  A plan says
when it took a shape from there; training never does.
"""

import re
from pathlib import Path, PurePath

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.model.families import FAMILIES
from endprompt_megatron.model.shape import ModelShape, read_shape, shape_of

_MAKERS = ("meta-", "meta_", "huggingfacetb-", "mistralai-")
_ENDINGS = ("-hf", "-instruct", "-chat", "-base")


def published_configs() -> dict[str, dict]:
    """Configs by the last part of the hub's name, without a maker's prefix."""
    return {
        name: {"model_type": family.model_type, **config}
        for family in FAMILIES.values()
        for name, config in family.published.items()
    }


def published_config(name: str) -> dict | None:
    """The config of the published model that `name` (a directory, a hub's name) is called after, or None.

    Upper and lower case, `Meta-` before and `-hf` or `-Instruct` after the name, and the dash after Llama
    make no difference: Llama-2-7b-hf, Meta-Llama-3-8B, Llama3.1-70B-Instruct.  `-64k` at its end stands for a
    model that was extended to that window.
    """
    plain = plain_name(name)
    extended = re.fullmatch(r"(.+)-(\d+)k", plain)
    if extended:
        base = published_config(extended.group(1))
        return base and {**base, "max_position_embeddings": 1024 * int(extended.group(2))}
    return published_configs().get("mistral-7b-v0.3" if plain == "mistral-7b-instruct-v0.3" else plain)


def plain_name(name: str) -> str:
    """A model's name without its maker and ending, in small letters: llama-3-8b for Meta-Llama-3-8B-Instruct."""
    plain = PurePath(name).name.lower().replace("_", "-").replace(" ", "-")
    for maker in _MAKERS:
        plain = plain.removeprefix(maker)
    for _ in _ENDINGS:
        for ending in _ENDINGS:
            plain = plain.removesuffix(ending)
    if plain.startswith("llama") and not plain.startswith("llama-"):
        plain = "llama-" + plain.removeprefix("llama")
    return plain


def shape_for(hf: str, where: str) -> tuple[ModelShape, bool]:
    """Shape of the model that model.hf names, and whether it is the published one because the directory is not here.

    Raises InputError where there is neither a directory nor a published model of that name.
    """
    directory = Path(hf)
    config = published_config(hf)
    try:
        return read_shape(directory), False
    except InputError:
        if directory.exists():  # it exists and is broken: report that
            raise
    if config is None:
        known = ", ".join(sorted(published_configs()))
        raise InputError(
            f"{where}: model.hf={hf}: no such directory, and no published model of that name; "
            f"published shapes are {known}"
        )
    return shape_of(config, hf), True
