"""Whether the memory of the plan fits the GPUs: the fullest pipeline stage on the smallest GPU."""

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.config.recipe import Recipe
from endprompt_megatron.distributed.hardware import of_kind, te_version
from endprompt_megatron.model.shape import read_shape
from endprompt_megatron.plan.plan import GIB, memory
from endprompt_megatron.preflight.table import FAIL, NOT_RUN, OK, WARN, Finding

CHECK = "memory by the plan"
_UNCERTAINTY = 4.0  # GiB by which the estimate may be wrong, as tools/plan.py says


def fits(recipe: Recipe, world_size: int, gpus: dict[int, dict], kind: str | None) -> list[Finding]:
    """The finding; none if there is no GPU and no `kind` was named.  `gpus`: node.process_facts by rank."""
    sizes = [seen["visible"][seen["own"]][1] for seen in gpus.values() if seen["own"]]
    if not sizes and kind is None:
        return []
    smallest, name = (min(sizes), "the smallest GPU") if sizes else (of_kind(kind).gpu.memory_gib, f"--gpu {kind}")
    try:
        te = not sizes or te_version() is not None
        stages = memory(read_shape(recipe.model.hf), recipe, world_size, te)
    except (InputError, ValueError, ZeroDivisionError):  # from a layout that the check of the recipe refuses
        return [Finding(CHECK, "needs a legal recipe, see above", NOT_RUN)]
    stage = max(stages, key=lambda stage: stage.total)
    needed = stage.total / GIB
    found = f"{needed:.1f} GiB on pipeline stage {stage.stage}, {smallest:.1f} GiB on {name}"
    if needed > smallest:
        return [Finding(CHECK, f"{found}; tools/plan.py proposes layouts that fit", FAIL)]
    if needed > smallest - _UNCERTAINTY:
        return [Finding(CHECK, f"{found}; within the plan's uncertainty of {_UNCERTAINTY:g} GiB", WARN)]
    return [Finding(CHECK, found, OK)]
