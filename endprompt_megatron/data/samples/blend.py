"""What a recipe trains on: its sources, their shares, and whose turn it is.  numpy alone.

A source is a dataset with a weight and, optionally, end prompts of its own.  Weights are shares of the
samples, whatever the sources' sizes: one that is smaller than its share is read again, shuffled anew.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.config.recipe import Recipe


@dataclass(frozen=True)
class Source:
    """A dataset of a blend; `prompts` are names as in context.prompts, None for those of the recipe."""

    prefix: str
    weight: float = 1.0
    prompts: tuple[str, ...] | None = None


def sources_of(value: Any, key: str) -> list[Source]:
    """data.train or data.valid: PREFIX, [PREFIX, ...], {PREFIX: weight} or {PREFIX: {weight: ..., prompts: [...]}}.

    Raises InputError for anything else.
    """
    if isinstance(value, str) and value:
        return [Source(value)]
    if isinstance(value, list) and value and all(isinstance(prefix, str) and prefix for prefix in value):
        twice = next((prefix for prefix in value if value.count(prefix) > 1), None)
        if twice is not None:  # both would give the same samples at the same time
            raise InputError(f"{key}: {twice} is named twice; give it a weight, such as {{{twice}: 2}}")
        return [Source(prefix) for prefix in value]
    if isinstance(value, dict) and value:
        return [_source(str(prefix), entry, key) for prefix, entry in value.items()]
    raise InputError(
        f"{key}={value} should be a PREFIX, a list of them, or a mapping from PREFIX to weight or {{weight, prompts}}"
    )


def _source(prefix: str, entry: Any, key: str) -> Source:
    fields = {"weight": entry} if not isinstance(entry, dict) else entry
    unknown = next((name for name in fields if name not in ("weight", "prompts")), None)
    if unknown is not None:
        raise InputError(f"{key}: unknown key {unknown} of {prefix}; a source takes weight, prompts")
    weight, prompts = fields.get("weight", 1.0), fields.get("prompts")
    if not isinstance(weight, int | float) or isinstance(weight, bool):
        raise InputError(f"{key}: weight={weight} of {prefix} should be a number, its share of the samples")
    if not (math.isfinite(weight) and weight > 0):
        raise InputError(f"{key}: weight {weight} of {prefix} should be above 0; leave out what should not be used")
    if prompts is not None and (
        not isinstance(prompts, list) or not prompts or not all(isinstance(name, str) for name in prompts)
    ):
        raise InputError(f"{key}: prompts={prompts} of {prefix} should be a list as in context.prompts, such as [EP_2]")
    return Source(prefix, float(weight), None if prompts is None else tuple(prompts))


def is_split(valid: Any) -> bool:
    """Whether data.valid holds out a share of data.train's documents, such as 99,1."""
    return isinstance(valid, str) and bool(valid) and all(c.isdigit() or c in ", ." for c in valid) and "," in valid


def prompts_used(recipe: Recipe) -> list[str]:
    """Names of every end prompt that a sample of the run can end with, each once.  Raises InputError."""
    blends = [("data.train", recipe.data.train)]
    if recipe.data.valid is not None and not is_split(recipe.data.valid):
        blends.append(("data.valid", recipe.data.valid))
    names: dict[str, None] = {}
    for key, value in blends:
        for source in sources_of(value, key) if value else []:
            names |= dict.fromkeys(recipe.context.prompts if source.prompts is None else source.prompts)
    return list(names or recipe.context.prompts)


def turns(weights: list[float], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Whose turn it is: source numbers int16 [count], and the number of the sample within its source int64 [count].

    A source's sample j is due at (j + 1/2) / share and samples come as they are due, so among the first n of
    them a source of K has its share, give or take 1/2 + share * K / 2.  More samples only add turns to the end.
    """
    shares = np.asarray(weights, dtype=np.float64) / np.sum(weights, dtype=np.float64)
    enough = np.ceil(count * shares + shares * len(shares)).astype(np.int64) + 1
    within = np.concatenate([np.arange(n) for n in enough])
    source = np.repeat(np.arange(len(shares), dtype=np.int16), enough)
    due = np.argsort((within + 0.5) / shares[source], kind="stable")[:count]
    return source[due], within[due]
