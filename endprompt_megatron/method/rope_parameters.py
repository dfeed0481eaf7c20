"""The RoPE that a Hugging Face config describes, in the form of transformers 4 or of transformers 5.  No torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RopeParameters:
    """`type` is "default" where positions are not scaled; `scaling` has the other parameters of that type."""

    theta: Any
    type: str
    scaling: dict[str, Any] = field(default_factory=dict)


def rope_parameters(config: Mapping[str, Any], default_theta: float = 10000.0) -> RopeParameters:
    """RoPE of a parsed config.json.  `default_theta`: what the model's family means by a base that is left out.

    transformers 5 keeps all of it in rope_parameters, transformers 4 the base at the top level.
    """
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = found.pop("rope_theta", None)
    kinds = found.pop("rope_type", None), found.pop("type", None)
    return RopeParameters(
        theta if theta is not None else config.get("rope_theta", default_theta),
        str(next(filter(None, kinds), "default")),
        found,
    )
