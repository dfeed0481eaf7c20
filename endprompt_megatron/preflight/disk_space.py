"""Free space for what a run writes: its checkpoints, the conversion before it and the export after it.

Sizes follow from the shape and the recipe; needs on the same file system are added up.  Quotas are not visible
here: the operating system reports the free space of the file system.
"""

import os
import shutil
from pathlib import Path

from endprompt_megatron.checkpoint.layout import complete_iterations
from endprompt_megatron.common.units import format_bytes
from endprompt_megatron.config.recipe import Recipe
from endprompt_megatron.model import longlora
from endprompt_megatron.model.shape import ModelShape
from endprompt_megatron.preflight.table import FAIL, OK, WARN, Finding

CHECK = "free disk"
_TIGHT = 1.1  # a margin for logs and metrics


def weight_bytes(recipe: Recipe, shape: ModelShape) -> int:
    """Bytes of the weights only: a converted checkpoint, or an export."""
    return shape.parameters * (2 if recipe.precision.dtype == "bfloat16" else 4)


def checkpoint_bytes(recipe: Recipe, shape: ModelShape) -> int:
    """Bytes of one checkpoint of a run: weights, float32 master weights and AdamW's two moments."""
    return longlora.checkpoint_bytes(shape, recipe.longlora, 2 if recipe.precision.dtype == "bfloat16" else 4)


def checkpoints_kept(recipe: Recipe) -> int:
    """The most checkpoints on disk at a time: those that are kept at the end, and the one being written."""
    k, steps = recipe.checkpoint, recipe.train.steps
    saved = [*range(k.interval, steps, k.interval), steps]
    kept = set(saved[-k.keep :] if k.keep else saved)
    if k.keep_every:
        kept |= {step for step in saved if step % k.keep_every == 0}
    return len(kept) + (1 if len(saved) > len(kept) else 0)


def free_disk(recipe: Recipe, shape: ModelShape, count: int | None, export: Path | None) -> list[Finding]:
    """A finding per file system.  `count` overrides the number of checkpoints; `export`: its directory, or RUN."""
    run, weights = recipe.run_dir, weight_bytes(recipe, shape)
    wanted = checkpoints_kept(recipe) if count is None else count
    existing = len(complete_iterations(run / "checkpoints"))
    left = max(wanted - existing, 1)  # while one is written, the oldest still exists
    each = checkpoint_bytes(recipe, shape)
    already = f" ({existing} of {wanted} exist)" if existing else ""
    needs = [(run, left * each, f"{left} checkpoint{'s' * (left > 1)} of {format_bytes(each)}{already}")]
    needs.append((export or run, weights, f"the export {format_bytes(weights)}"))
    if recipe.model.init_from is not None and not Path(recipe.model.init_from).exists() and not existing:
        needs.append((Path(recipe.model.init_from), weights, f"the conversion {format_bytes(weights)}"))
    needs_of_device: dict[int, list] = {}
    for need in needs:
        needs_of_device.setdefault(os.stat(_existing(need[0])).st_dev, []).append(need)
    return [_finding(needs) for needs in needs_of_device.values()]


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _finding(needs: list[tuple[Path, int, str]]) -> Finding:
    place = needs[0][0]
    free, needed = shutil.disk_usage(_existing(place)).free, sum(count for _, count, _ in needs)
    reasons = ", ".join(reason for _, _, reason in needs)
    found = f"{place}: {format_bytes(needed)} needed ({reasons}), {format_bytes(free)} free"
    if free < needed:
        return Finding(CHECK, f"{found}; free {format_bytes(needed - free)}, or keep fewer (checkpoint.keep)", FAIL)
    return Finding(
        CHECK, f"{found}; little to spare" if free < _TIGHT * needed else found, WARN if free < _TIGHT * needed else OK
    )
