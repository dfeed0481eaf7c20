"""The table of position maps in docs/methods.md, made from their declarations.

python -m endprompt_megatron.method.map_table docs/methods.md
"""

from endprompt_megatron.common.generated_tables import main, markdown
from endprompt_megatron.method.positions import MAPS

MODULE = "endprompt_megatron.method.map_table"


def map_table() -> str:
    """A row a map: its name, what it does with the two segments, whether samples differ, its keys of `context`."""
    rows = [
        [
            f"`{position_map.name}`",
            position_map.context,
            position_map.prompt or "none",
            "differ" if position_map.varies else "alike",
            ", ".join(f"`{name}`" for name in position_map.knobs),
        ]
        for position_map in MAPS.values()
    ]
    return markdown(["method", "context segment", "terminal prompt", "samples", "keys of `context`"], rows)


if __name__ == "__main__":
    main(MODULE, map_table)
