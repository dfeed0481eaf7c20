"""The one reader and writer of the RoPE in a Hugging Face config, whatever form says it.  No torch.

transformers 5 keeps all of it in `rope_parameters`; transformers 4 keeps the base beside `rope_scaling`, whose type
was first called `type`.  Where a config holds several forms, or leaves something out, `read_rope` reads what
transformers 5 computes (RotaryEmbeddingConfigMixin), and writes every value out that a formula uses.  `scaled` composes
that with the scaling of a recipe, and `written` puts the result into a config in the forms that other versions read.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from endprompt_megatron.common.errors import InputError

ORIGINAL = "original_max_position_embeddings"
_LISTS = ("short_factor", "long_factor")
# What each type needs; what it may have besides, transformers has a default for.
_NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", ORIGINAL),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL),
    "longrope": ("factor", ORIGINAL, *_LISTS),
}
_OF_RATIO = ("yarn", "longrope")  # a factor of null means max_position_embeddings / original
_NUMBERS = ("factor", "low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow")
BY_LENGTH = ("dynamic", "longrope")  # frequencies follow the length that an input reaches
# Types of which a second scaling is one of the same type, with the product of both factors.
COMPOSED = ("linear", "dynamic", "yarn", "llama3", "longrope")


@dataclass(frozen=True)
class RopeParameters:
    """What a model's RoPE computes, equal for all forms of config that mean the same.

    `scaling` has the parameters of the type, without type and base.  `dim`: elements of a head, which all rotate.
    """

    type: str
    theta: float
    dim: int
    max_position: int  # max_position_embeddings
    scaling: dict[str, Any] = field(default_factory=dict)

    @property
    def original(self) -> int:
        """The window that the type's formula takes for the one before it was scaled."""
        return self.scaling.get(ORIGINAL, self.max_position)

    @property
    def window(self) -> int:
        """Tokens that the model is made for.

        Dynamic scaling leaves the original window in max_position_embeddings, and YaRN's is often left there.
        """
        if self.type == "dynamic" or (ORIGINAL in self.scaling and self.max_position <= self.original):
            return round(self.original * self.scaling["factor"])
        return self.max_position

    @property
    def follows_length(self) -> bool:
        """Whether the frequencies depend on the length that an input reaches."""
        return self.type in BY_LENGTH


@dataclass(frozen=True)
class Scaling:
    """The scaling that a recipe asks for (context.rope), and the windows that it leads from and to, in tokens.

    `knobs`: further parameters of the type, under transformers' names.
    """

    type: str
    factor: float
    original: int
    target: int
    theta: float | None = None
    knobs: Mapping[str, Any] = field(default_factory=dict)


def read_rope(config: Mapping[str, Any], head_dim: int, where: str) -> RopeParameters:
    """RoPE of a parsed config.json in which the family's defaults stand (Family.complete).

    Raises InputError, naming `where` and the key, for what transformers would not compute or would compute otherwise.
    """
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(config.get(key), dict | None):
            raise InputError(f"{where}: {key}={config[key]} should be an object or null")
    # transformers 5 obeys rope_scaling where both stand, and takes nothing from the other.
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    found = copy.deepcopy(config.get(key) or {})
    if by_layer := sorted(name for name, value in found.items() if isinstance(value, dict)):
        raise InputError(
            f"{where}: {key}.{by_layer[0]}: RoPE by kind of layer is not supported; use one for all layers"
        )
    theta, at_top = found.pop("rope_theta", None), config.get("rope_theta")
    theta = at_top if theta is None else theta
    _refuse_lost_theta(config, key, theta, where)
    names = [found.pop(name, None) for name in ("rope_type", "type")]
    kind = next((name for name in names if name), "default")
    if kind not in _NEEDS:
        raise InputError(f"{where}: {key}.rope_type={kind} is not supported; supported are {', '.join(_NEEDS)}")
    partial = found.pop("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise InputError(f"{where}: partial_rotary_factor={partial} is not supported; LLaMA models rotate whole heads")
    if not _is_number(theta):
        raise InputError(f"{where}: rope_theta={theta} should be a positive number")
    rope = RopeParameters(kind, float(theta), head_dim, config["max_position_embeddings"], found)
    if ORIGINAL in _NEEDS[kind]:
        # Phi-3's place for it has priority in transformers.
        beside = config.get(ORIGINAL)
        found[ORIGINAL] = beside if beside is not None else found.get(ORIGINAL) or rope.max_position
    if kind in _OF_RATIO and found.get("factor") is None and (kind == "longrope" or "factor" in found):
        found["factor"] = rope.max_position / found[ORIGINAL] if _is_number(found[ORIGINAL]) else None
    _check(rope, key, where)
    return rope


def _refuse_lost_theta(config: Mapping[str, Any], key: str, theta: Any, where: str) -> None:
    """A base in rope_parameters that transformers does not see, since rope_scaling stands beside it."""
    other = (config.get("rope_parameters") or {}).get("rope_theta")
    if key == "rope_scaling" and other is not None and other != theta:
        raise InputError(
            f"{where}: rope_parameters.rope_theta={other} is lost beside rope_scaling, and transformers takes {theta}: "
            "move the scaling into rope_parameters and leave out rope_scaling"
        )


def _check(rope: RopeParameters, key: str, where: str) -> None:
    """Raise InputError for a parameter that is missing, or of the wrong type or length."""
    for name in _NEEDS[rope.type]:
        if rope.scaling.get(name) is None:
            raise InputError(f"{where}: {key}.{name} is missing; {rope.type} RoPE needs it")
    for name in (*_NUMBERS, ORIGINAL):
        value = rope.scaling.get(name)
        if value is not None and not _is_number(value):
            raise InputError(f"{where}: {key}.{name}={value!r} should be a positive number")
    for name in _LISTS if rope.type == "longrope" else ():
        values = rope.scaling[name]
        if not isinstance(values, list) or len(values) != rope.dim // 2 or not all(map(_is_number, values)):
            raise InputError(
                f"{where}: {key}.{name} should be a list of {rope.dim // 2} positive numbers, half of "
                f"head_dim={rope.dim}"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def scaled(own: RopeParameters, asked: Scaling, where: str) -> RopeParameters:
    """The RoPE of a model with RoPE `own` after the extension that a recipe asks for.

    ntk: a fixed change of base, theta' = theta * factor^(d / (d - 2)) (NTK-aware scaling, bloc97 2023), so it needs no
    scaling type.  none: the model's own scaling stays.  keep: its window too.  A type on a model that has it already:
    one scaling of that type with the product of both factors, from the first original window.  Raises InputError,
    naming the recipe `where`, if the model's own scaling and the one asked for cannot be told in one config.
    """
    rope = replace(own, theta=asked.theta or own.theta, scaling=dict(own.scaling))
    if asked.type == "keep":
        return rope
    if asked.type == "none":
        # Dynamic scaling's formula takes the original window from this very field.
        return rope if own.type == "dynamic" else replace(rope, max_position=asked.target)
    if own.type not in ("default", asked.type):
        others = f"{own.type} or none" if own.type in COMPOSED else "none"
        raise InputError(
            f"{where}: context.rope.type={asked.type} cannot be put on top of the model's own {own.type} scaling: use "
            f"{others}, or keep to train in its own window"
        )
    if asked.type == "ntk":
        grown = asked.factor ** (own.dim / (own.dim - 2))
        return replace(rope, theta=rope.theta * grown, max_position=asked.target)
    again = own.type == asked.type
    original = own.original if again else asked.original
    factor = asked.factor * own.scaling["factor"] if again else asked.factor
    scaling = {**own.scaling, **asked.knobs, "factor": factor}
    if again and "attention_factor" not in asked.knobs and _is_of_formula(own):
        del scaling["attention_factor"]  # it belongs to the first factor; transformers computes that of both
    if asked.type == "llama3":
        scaling = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, **scaling}
    if asked.type == "longrope":
        scaling.setdefault("short_factor", [1.0] * (own.dim // 2))
    if ORIGINAL in _NEEDS[asked.type]:
        scaling[ORIGINAL] = original
    window = original if asked.type == "dynamic" else asked.target
    rope = replace(rope, type=asked.type, max_position=window, scaling=scaling)
    _check(rope, "context.rope", where)
    return rope


def _is_of_formula(rope: RopeParameters) -> bool:
    """Whether the config gives the attention factor that transformers computes where none is given."""
    given, factor = rope.scaling.get("attention_factor"), rope.scaling["factor"]
    if given is None:
        return False
    if rope.type == "longrope":
        computed = math.sqrt(1 + math.log(factor) / math.log(rope.original)) if factor > 1 else 1.0
    else:
        computed = 0.1 * math.log(max(factor, 1.0)) + 1.0
    return math.isclose(given, computed, rel_tol=1e-5)


def written(config: Mapping[str, Any], rope: RopeParameters) -> dict[str, Any]:
    """The config with this RoPE instead of its own; the input is not changed.

    In two forms: `rope_parameters` is what transformers 5 reads, `rope_theta` with `rope_scaling` what transformers 4
    and vLLM read.  Both obey rope_scaling where it stands.  transformers before 4.43 takes linear and dynamic scaling
    only as {"type", "factor"}, with a factor above 1 that is a float; later ones take that too.
    """
    config = copy.deepcopy(dict(config))
    config.pop(ORIGINAL, None)
    if rope.type == "longrope":
        config[ORIGINAL] = rope.original  # where transformers 4 looks for it, as Phi-3 has it
    kind, scaling = rope.type, copy.deepcopy(rope.scaling)
    if kind == "linear" and scaling["factor"] == 1:
        kind, scaling = "default", {}
    old: dict[str, Any] | None = {"rope_type": kind, **scaling}
    if kind == "default":
        old = None
    elif kind in ("linear", "dynamic"):
        old = {"type": kind, **scaling, "factor": float(scaling["factor"])}
    config["rope_theta"] = rope.theta
    config["rope_scaling"] = old  # without theta, of which transformers 4 would complain
    config["rope_parameters"] = {"rope_type": kind, **scaling, "rope_theta": rope.theta}
    config["max_position_embeddings"] = rope.max_position
    return config
