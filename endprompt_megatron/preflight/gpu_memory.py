"""Whether the plan's memory fits the GPUs that are there: the fullest pipeline stage on the smallest GPU."""

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.config.recipe import Recipe
from endprompt_megatron.distributed.hardware import of_kind, te_version
from endprompt_megatron.model.shape import read_shape
from endprompt_megatron.plan.plan import GIB, memory
from endprompt_megatron.preflight.table import FAIL, NOT_RUN, OK, WARN, Finding

CHECK = "memory by the plan"
_SURE = 4.0  # GiB that the estimate may be off by, as tools/plan.py says


def fits(recipe: Recipe, world_size: int, parts: dict[int, dict], kind: str | None) -> list[Finding]:
    """The finding; none where there is no GPU and none (`kind`) was named.  `parts`: node.process_facts."""
    held = [part["visible"][part["own"]][1] for part in parts.values() if part["own"]]
    if not held and kind is None:
        return []
    smallest, name = (min(held), "the smallest GPU") if held else (of_kind(kind).gpu.memory_gib, f"--gpu {kind}")
    try:
        engine = not held or te_version() is not None
        stages = memory(read_shape(recipe.model.hf), recipe, world_size, engine)
    except (InputError, ValueError, ZeroDivisionError):  # of a layout that the recipe's own check refuses
        return [Finding(CHECK, "needs a legal recipe, see above", NOT_RUN)]
    stage = max(stages, key=lambda stage: stage.total)
    needed = stage.total / GIB
    found = f"{needed:.1f} GiB on pipeline stage {stage.stage}, {smallest:.1f} GiB on {name}"
    if needed > smallest:
        return [Finding(CHECK, f"{found}; tools/plan.py names layouts that fit", FAIL)]
    if needed > smallest - _SURE:
        return [Finding(CHECK, f"{found}; closer than the plan is sure of", WARN)]
    return [Finding(CHECK, found, OK)]
