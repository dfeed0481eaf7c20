"""The best legal layouts for a number of GPUs, the nearest that fits, and the best for full-length training."""

import copy
from collections.abc import Iterator
from dataclasses import replace

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.config.constraints import check as rules
from endprompt_megatron.config.recipe import LongLora, Recall, Recipe, Retain
from endprompt_megatron.distributed.hardware import Hardware
from endprompt_megatron.model.shape import ModelShape
from endprompt_megatron.plan.estimate import Estimate, estimate
from endprompt_megatron.plan.memory import GIB, memory, optimizer_bytes, stage_elements
from endprompt_megatron.plan.step_time import NODE

MAX_GPUS = 16384
SPARE_GIB = 2.0  # that every proposed layout leaves free: the estimate is not more precise


def search(shape: ModelShape, recipe: Recipe, hardware: Hardware, gpus: int, limit: int = 8) -> list[Estimate]:
    """The fastest layouts that are legal and fit, fastest first, one for each (tensor, pipeline, context).

    Batch, precision and optimizer are the recipe's.  Empty if nothing fits.
    """
    best: dict[tuple[int, int, int], Estimate] = {}
    for candidate in _layouts(shape, recipe, hardware, gpus):
        if not _legal(shape, candidate, hardware, gpus):
            continue
        stages = memory(shape, candidate, gpus)
        if max(stage.total for stage in stages) > (hardware.gpu.memory_gib - SPARE_GIB) * GIB:
            continue
        found = estimate(shape, candidate, hardware.gpu, gpus, stages)
        p = candidate.parallel
        key = (p.tensor, p.pipeline, p.context)
        if key not in best or found.step_seconds < best[key].step_seconds:
            best[key] = found
    return sorted(best.values(), key=lambda found: found.step_seconds)[:limit]


def _legal(shape: ModelShape, recipe: Recipe, hardware: Hardware, gpus: int) -> bool:
    try:
        rules.check_for(recipe, "", shape, world_size=gpus, hardware=hardware)
    except InputError:
        return False
    return True


def _layouts(shape: ModelShape, recipe: Recipe, hardware: Hardware, gpus: int) -> Iterator[Recipe]:
    """Recipes that differ only in their layout; most are legal, and in all of them weights and optimizer fit."""
    available = hardware.gpu.memory_gib * GIB
    for tensor in _divisors(min(NODE, gpus)):
        for context in _divisors(gpus // tensor):
            for pipeline in _divisors(gpus // (tensor * context)):
                replicas = gpus // (tensor * context * pipeline)
                if recipe.train.global_batch_size % (replicas * recipe.train.micro_batch_size):
                    continue
                for counts, virtual in _splits(shape.num_layers, pipeline):
                    parallel = replace(
                        recipe.parallel,
                        tensor=tensor,
                        context=context,
                        pipeline=pipeline,
                        virtual_pipeline=virtual if virtual > 1 else None,
                        count_embedding=counts,
                        count_loss=counts,
                        sequence=tensor > 1,
                        overlap_tensor=tensor > 1 and not recipe.longlora.rank,
                        recompute="none",
                        recompute_layers=None,
                    )
                    held, trained = stage_elements(shape, replace(recipe, parallel=parallel), 0)
                    if 2 * held + trained * (4 + optimizer_bytes(recipe) / (context * replicas)) > available:
                        continue
                    yield from _with_recompute(recipe, parallel, shape.num_layers // (pipeline * virtual))


def _with_recompute(recipe: Recipe, parallel: object, layers: int) -> Iterator[Recipe]:
    """The layout without recomputation, with some layers of each virtual stage recomputed, and with all."""
    for recompute, count in (("none", None), ("block", layers // 4), ("block", layers // 2), ("full", None)):
        if recompute == "block" and not count:
            continue
        other = copy.copy(recipe)
        other.parallel = replace(parallel, recompute=recompute, recompute_layers=count)
        yield other


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if (number % d == 0 and d & (d - 1) == 0) or d == number]


def _splits(layers: int, pipeline: int) -> Iterator[tuple[bool, int]]:
    """(embedding and loss counted, virtual stages) that divide the layers over the pipeline."""
    for counts in (False, True):
        total = layers + 2 * counts
        if (counts and pipeline == 1) or total % pipeline:
            continue
        for virtual in range(1, total // pipeline + 1):
            if (total // pipeline) % virtual == 0 and (virtual == 1 or pipeline > 1):
                yield counts, virtual


def full_length(shape: ModelShape, recipe: Recipe, hardware: Hardware, gpus: int) -> Estimate | None:
    """The cheapest training at the full target length: the best layout on `gpus` GPUs, or on more.

    It has as many sequences per step as the recipe, so the pipeline is as busy, and as many tokens in total.
    None if no number of GPUs is enough.
    """
    full = copy.deepcopy(recipe)
    full.context.method, full.context.physical = "full", recipe.context.target
    # Keys that only apply to the recipe's method would be refused here.
    full.context.recall, full.context.retain, full.context.content_skip = Recall(), Retain(), False
    full.data.packing, full.data.align = "stream", None
    full.longlora = LongLora()
    full.train.micro_batch_size = 1
    full.train.steps = max(1, round(recipe.train.steps * recipe.tokens_per_step / full.tokens_per_step))
    full.train.tokens = None
    full.train.virtual_distances = []
    full.optim.warmup_steps = 0
    best = None
    count = gpus
    while count <= MAX_GPUS and (best is None or count <= 4 * best.gpus):
        found = search(shape, full, hardware, count, limit=1)
        # More GPUs may make recomputation unnecessary; they must be worth it.
        if found and (best is None or found[0].tokens_per_gpu_second > 1.02 * best.tokens_per_gpu_second):
            best = found[0]
        count *= 2
    return best


def remedies(
    shape: ModelShape, recipe: Recipe, hardware: Hardware, gpus: int, limit: int = 3
) -> list[tuple[list[str], Estimate]]:
    """Changes that make a recipe fit: (keys to set, the resulting estimate).  Fewest changes first, then the fastest.

    If a change needs more GPUs, the first key says how many.
    """
    found = []
    for keys, count, changed in _changes(recipe, gpus, shape.num_layers):
        if count > MAX_GPUS or not _legal(shape, changed, hardware, count):
            continue
        given = estimate(shape, changed, hardware.gpu, count)
        if given.fullest.total <= (hardware.gpu.memory_gib - SPARE_GIB) * GIB:
            found.append((keys, given))
    found.sort(key=lambda entry: (entry[1].gpus > gpus, len(entry[0]), entry[1].gpus * entry[1].step_seconds))
    kept: list[tuple[list[str], Estimate]] = []
    for keys, given in found:
        # Keep only the fastest number of recomputed layers, and no superset of keys that already make it fit.
        if not any(set(_names(other)) <= set(_names(keys)) for other, _ in kept):
            kept.append((keys, given))
    return kept[:limit]


def _names(keys: list[str]) -> list[str]:
    return [key.split("=")[0] for key in keys]


def _changes(recipe: Recipe, gpus: int, layers: int) -> Iterator[tuple[list[str], int, Recipe]]:
    p = recipe.parallel
    per_chunk = -(-layers // (p.pipeline * (p.virtual_pipeline or 1)))
    recomputes: list[dict] = [{}]
    if p.recompute in ("none", "selective"):
        recomputes += [{"recompute": "block", "recompute_layers": count} for count in range(1, per_chunk)]
        recomputes.append({"recompute": "full", "recompute_layers": None})
    elif p.recompute == "block":
        recomputes += [{"recompute_layers": count} for count in range((p.recompute_layers or 0) + 1, per_chunk)]
        recomputes.append({"recompute": "full", "recompute_layers": None})
    splits: list[dict] = [{}]
    for factor in (2, 4, 8):
        splits.append({"tensor": p.tensor * factor, "sequence": True})
        splits.append({"pipeline": p.pipeline * factor})
        splits.append({"context": p.context * factor})
    others: list[tuple[str, str, str]] = [("", "", "")]
    if recipe.optim.moments_dtype == "float32":
        others.append(("optim", "moments_dtype", "bfloat16"))
    if recipe.precision.grad_reduce == "float32" and recipe.precision.dtype == "bfloat16":
        others.append(("precision", "grad_reduce", "bfloat16"))
    for more in (1, 2, 4, 8):
        for recompute in recomputes:
            for split in splits:
                if split.get("tensor", 1) > NODE:
                    continue
                for section, name, value in others:
                    changes = {key: new for key, new in (recompute | split).items() if getattr(p, key) != new}
                    changed = copy.copy(recipe)
                    changed.parallel = replace(p, **changes)
                    keys = [f"parallel.{key}={'null' if new is None else _word(new)}" for key, new in changes.items()]
                    if section:
                        setattr(changed, section, replace(getattr(recipe, section), **{name: value}))
                        keys.append(f"{section}.{name}={value}")
                    if more > 1:
                        keys.insert(0, f"--world-size={gpus * more}")
                    if keys:
                        yield keys, gpus * more, changed


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
