"""How a recipe key is declared: once, in its dataclass field, with its meaning, its limits and whether a run keeps it.

recipe.py declares the keys, load.py reads and checks their values, checkpoint/resume.py refuses a changed one, and
key_table.py writes the table of docs/recipes.md.
"""

import copy
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any

from endprompt_megatron.common.errors import InputError

REQUIRED = "???"  # OmegaConf's value of a key that has to be given


@dataclass(frozen=True)
class Key:
    """What is said of a key beside its type and its default."""

    meaning: str
    choices: Collection[str] = ()  # the legal values; a mapping says in words what each is
    positive: bool = False
    minimum: float | None = None
    maximum: float | None = None
    fixed: bool | str = False  # it decides what a step does, so a resumed run keeps it; or what of it, in words
    unset: str = ""  # what None stands for, in words
    name: str | None = None  # in YAML, where Python cannot have that name

    def check(self, where: str, dotted: str, value: Any) -> None:
        """Raise InputError for a value that can never be right; None is left to those who resolve it."""
        if isinstance(value, int | float) and not isinstance(value, bool):
            self._check_number(where, dotted, value)
        if self.choices and value is not None and value not in self.choices:
            raise InputError(f"{where}: {dotted}={value} should be one of {', '.join(self.choices)}")

    def _check_number(self, where: str, dotted: str, value: float) -> None:
        if not math.isfinite(value):
            raise InputError(f"{where}: {dotted}={value} should be a finite number")
        if self.positive and value <= 0:
            raise InputError(f"{where}: {dotted}={value} should be positive")
        low, high = self.minimum, self.maximum
        if low is not None and high is not None and not low <= value <= high:
            raise InputError(f"{where}: {dotted}={value} should lie between {low} and {high}")
        if low is not None and value < low:
            raise InputError(f"{where}: {dotted}={value} should be at least {low}")


def entry(default: Any, meaning: str, **said: Any) -> Any:
    """A dataclass field that is a recipe key; `said` as in Key."""
    metadata = {"key": Key(meaning, **said)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(keys: type) -> Any:
    """A dataclass field that is a section of the recipe: a dataclass of keys."""
    return field(default_factory=keys)


@dataclass(frozen=True)
class Declared:
    """A key where it stands: its dotted name in YAML, what the dataclass field is called, its type and its default."""

    dotted: str
    attribute: str
    kind: str
    key: Key
    default: Any


def keys_of(recipe: type, prefix: str = "") -> Iterator[Declared]:
    """Every key of a recipe's dataclass and its sections, in their order."""
    for declared in fields(recipe):
        dotted = prefix + yaml_name(declared)
        if "key" in declared.metadata:
            default = declared.default if declared.default is not MISSING else declared.default_factory()
            kind = declared.type.__name__ if isinstance(declared.type, type) else str(declared.type)
            yield Declared(dotted, declared.name, kind, declared.metadata["key"], default)
        elif is_dataclass(declared.default_factory):
            yield from keys_of(declared.default_factory, f"{dotted}.")
        else:
            raise TypeError(f"{recipe.__name__}.{declared.name} should be declared by entry() or section()")


def yaml_name(declared: Any) -> str:
    """What a dataclass field is called in YAML."""
    said = declared.metadata.get("key")
    return said.name if said is not None and said.name else declared.name


def names_in(recipe: type, dotted: str = "") -> list[str]:
    """The names that a section takes; the recipe's own without a section, [] where there is no such section."""
    node: Any = recipe
    for name in filter(None, dotted.split(".")):
        found = [f.default_factory for f in fields(node) if yaml_name(f) == name and is_dataclass(f.default_factory)]
        if not found:
            return []
        [node] = found
    return [yaml_name(declared) for declared in fields(node)]


def section_and_name(dotted: str) -> tuple[str, str]:
    """context.rope and type of context.rope.type; no section for a name without a dot."""
    section, _, name = dotted.rpartition(".")
    return section, name


def get(tree: Any, dotted: str, default: Any = None) -> Any:
    """The value under a dotted key of a recipe or of its plain tree; `default` where there is none, or None."""
    node = tree
    for name in dotted.split("."):
        if is_dataclass(node):
            node = next((getattr(node, f.name) for f in fields(node) if yaml_name(f) == name), None)
        else:
            node = node.get(name) if isinstance(node, Mapping) else None
    return default if node is None else node


def in_yaml_names(recipe: Any) -> Any:
    """The plain nested dict of a recipe, with the YAML names of its keys."""
    if not is_dataclass(recipe):
        return copy.deepcopy(recipe)
    return {yaml_name(declared): in_yaml_names(getattr(recipe, declared.name)) for declared in fields(recipe)}
