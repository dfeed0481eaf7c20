"""The table of model families in docs/conversion.md, made from their declarations.

python -m endprompt_megatron.model.family_table docs/conversion.md
"""

from endprompt_megatron.common.generated_tables import main, markdown
from endprompt_megatron.model.families import FAMILIES, Family

MODULE = "endprompt_megatron.model.family_table"


def family_table() -> str:
    """A row a family: its model_type, the published models that were tried, where it has biases, and further norms."""
    rows = [
        [f"`{family.model_type}`", family.models, _biases(family), "queries and keys" if family.qk_norm else ""]
        for family in FAMILIES.values()
    ]
    return markdown(["`model_type`", "models", "biases", "norms of heads"], rows)


def _biases(family: Family) -> str:
    places = {"q, k, v": family.qkv_bias, "o": family.proj_bias, "the feed-forward layers": family.mlp_bias}
    by_key: dict[bool | str, list[str]] = {}
    for place, declared in places.items():
        if declared:
            by_key.setdefault(declared, []).append(place)
    said = ["on " + ", ".join(on) + (f" with `{key}`" if isinstance(key, str) else "") for key, on in by_key.items()]
    return "; ".join(said) or "none"


if __name__ == "__main__":
    main(MODULE, family_table)
