"""Reads a recipe from YAML with dotted overrides, and refuses what is wrong whatever the model.

Unknown keys, wrong types and values that can never be right end in one line that names the key, the value and what
would be legal.  A recipe may say `inherit: other.yaml` and then holds only what differs.
"""

import math
import re
from pathlib import Path
from typing import Any, TypeVar

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.config.keys import REQUIRED, Declared, get, keys_of, names_in, section_and_name
from endprompt_megatron.config.recipe import Context, Recipe

AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)
_BUDGET = {"train.steps": "tokens", "train.tokens": "steps"}  # one replaces the other


def load_recipe(
    path: Path | str, overrides: list[str] | tuple[str, ...] = (), schema: type[AnyRecipe] = Recipe
) -> AnyRecipe:
    """Read a recipe and apply `key=value` overrides.  `schema` declares the keys.  Raises InputError.

    Defaults that follow from other keys are filled in; resolve.py fills in those that follow from the model.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    where = str(path)
    try:
        # Unsafe for those who go on with what was merged, and three times as fast: a study reads hundreds of recipes.
        merged = OmegaConf.unsafe_merge(OmegaConf.structured(schema), _read_yaml(Path(path), schema, set()))
        for override in overrides:
            where = override
            key, equals, _ = override.partition("=")
            if not equals or not key:
                raise InputError(f"{override}: expected key=value, such as train.steps=100")
            given = OmegaConf.from_dotlist([override])
            _use_attribute_names(given, schema)
            _take_whole_numbers(given, schema)
            merged = OmegaConf.unsafe_merge(merged, given)
            # The budget is stated once: an override in steps replaces one in tokens, and the other way round.
            if key in _BUDGET:
                merged.train[_BUDGET[key]] = None
        where = str(path)
        recipe = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise InputError(_explain(where, error, schema)) from None
    except yaml.YAMLError as error:
        raise InputError(f"{where}: not valid YAML ({' '.join(str(error).split())})") from None
    _check_keys(recipe, where)
    _fill_in(recipe, where)
    return recipe


def recipe_of(tree: dict, schema: type[AnyRecipe] = Recipe) -> AnyRecipe:
    """A recipe from the tree of a RUN/recipe.yaml, or from what there is of it, with nothing filled in.

    Raises InputError.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    given = OmegaConf.create(tree)
    _use_attribute_names(given, schema)
    nothing = OmegaConf.create({})
    for declared in keys_of(schema):
        if declared.default == REQUIRED:
            OmegaConf.update(nothing, declared.dotted, "")
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), nothing, given))
    except OmegaConfBaseException as error:
        raise InputError(_explain("recipe.yaml", error, schema)) from None


def _read_yaml(path: Path, schema: type, seen: set[Path]) -> Any:
    """Parsed YAML with `inherit` followed.  Raises InputError for a missing or broken file and for a cycle."""
    import yaml
    from omegaconf import OmegaConf

    if path.resolve() in seen:
        raise InputError(f"{path}: inherit leads back to this file; break the cycle")
    try:
        config = OmegaConf.load(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such recipe") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not OmegaConf.is_dict(config):
        raise InputError(f"{path}: a recipe is a mapping of sections (model, context, data, ...)")
    _use_attribute_names(config, schema)
    _take_whole_numbers(config, schema)
    parent = config.pop("inherit", None)
    if parent is None:
        return config
    if not isinstance(parent, str):
        raise InputError(f"{path}: inherit={parent} should be the name of one recipe")
    inherited = _read_yaml(path.parent / parent, schema, seen | {path.resolve()})
    ours, theirs = config.get("train"), inherited.get("train")
    budget = set(_BUDGET.values())
    if OmegaConf.is_dict(ours) and OmegaConf.is_dict(theirs) and budget & set(ours):
        for key in budget & set(theirs):  # this recipe states the budget anew, in whichever of the two units
            theirs.pop(key)
    return OmegaConf.merge(inherited, config)


def _use_attribute_names(config: Any, schema: type) -> None:
    """Rename the keys whose name Python reserves to those of their dataclass fields."""
    from omegaconf import OmegaConf

    for declared in _renamed(schema):
        section, name = section_and_name(declared.dotted)
        node = OmegaConf.select(config, section)
        if OmegaConf.is_dict(node) and name in node:
            node[declared.attribute] = node.pop(name)


def _take_whole_numbers(config: Any, schema: type) -> None:
    """Integers as people write large ones, 1e9 or 1.0e9, which YAML reads as a float or as text."""
    from omegaconf import OmegaConf

    for declared in keys_of(schema):
        if declared.kind not in ("int", "int | None"):
            continue
        section, _ = section_and_name(declared.dotted)
        node = OmegaConf.select(config, section)
        value = node.get(declared.attribute) if OmegaConf.is_dict(node) else None
        if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE]\+?\d+", value):
            value = float(value)
        if isinstance(value, float) and value.is_integer():
            node[declared.attribute] = int(value)


def _renamed(schema: type) -> list[Declared]:
    return [declared for declared in keys_of(schema) if declared.key.name]


def _explain(where: str, error: Exception, schema: type) -> str:
    """One line for OmegaConf's error: the key in full, and what would be right."""
    key, message = str(getattr(error, "full_key", None) or ""), str(error).splitlines()[0].strip()
    for declared in _renamed(schema):
        key, message = (text.replace(declared.attribute, declared.key.name) for text in (key, message))
    if type(error).__name__ in ("ConfigKeyError", "ConfigAttributeError"):
        section, name = section_and_name(key)
        return (
            f"{where}: unknown key {key or name}; {section or 'a recipe'} takes {', '.join(names_in(schema, section))}"
        )
    if type(error).__name__ == "MissingMandatoryValue" or "Incompatible value 'None'" in message:
        return f"{where}: {key or 'a key'} is missing"
    value_for_section = re.fullmatch(r"Merge error: .* is not a subclass of (\w+)\. value: (.*)", message)
    if value_for_section:
        kind, value = value_for_section.groups()
        return f"{where}: {kind.lower()}={value} should be a section with keys of its own"
    return f"{where}: {key}: {message}"


def _check_keys(recipe: Recipe, where: str) -> None:
    """Raise InputError for a key that is missing, and for a value that its declaration rules out."""
    for declared in keys_of(type(recipe)):
        value = get(recipe, declared.dotted)
        if declared.default == REQUIRED and value in (REQUIRED, ""):
            raise InputError(f"{where}: {declared.dotted} is missing")
        declared.key.check(where, declared.dotted, value)


def _fill_in(recipe: Recipe, where: str) -> None:
    """The defaults that follow from other keys."""
    data, train = recipe.data, recipe.train
    if recipe.context.rope.type == "keep":
        _keep_rope(recipe.context, where)
    set_factor(recipe.context)
    if data.packing == "documents" and data.align is None:
        # Ranks of context parallelism take two chunks of every sample.
        data.align = 2 * recipe.parallel.context if recipe.parallel.context > 1 else 1
    if data.kind == "chat" and data.long is None:
        data.long = "drop"
    from_tokens = math.ceil(train.tokens / recipe.tokens_per_step) if train.tokens is not None else None
    if train.steps is None and from_tokens is None:
        raise InputError(f"{where}: train.steps is missing; give it, or train.tokens")
    if None not in (train.steps, from_tokens) and train.steps != from_tokens:
        raise InputError(
            f"{where}: train.steps={train.steps} contradicts train.tokens={train.tokens} ({from_tokens} steps); "
            "give one"
        )
    train.steps = train.steps or from_tokens


def set_factor(context: Context) -> None:
    """The interpolation factor that follows from the lengths, where the recipe gives none and both are known."""
    if context.rope.factor is None and context.original is not None:
        context.rope.factor = context.target / context.original


def _keep_rope(context: Context, where: str) -> None:
    """The model's window is the target already, and its frequencies stay: whatever scales them again is refused."""
    if context.rope.factor not in (None, 1.0):
        raise InputError(
            f"{where}: context.rope.factor={context.rope.factor} with context.rope.type=keep: the checkpoint's own "
            "scaling stays as it is; leave the factor out"
        )
    if context.original not in (None, context.target):
        raise InputError(
            f"{where}: context.original={context.original} with context.rope.type=keep: nothing is extended, and the "
            f"model's window is context.target={context.target}; leave it out"
        )
    context.original = context.target
