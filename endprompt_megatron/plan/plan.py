"""The plan of a recipe: its estimate, what full-length training would cost, changes that make it fit, warnings.

Other packages import only this module of the planner.  estimate.py combines memory.py and step_time.py, search.py
finds layouts, plan_page.py prints.  Arithmetic; no torch, no Megatron.
"""

import math
from dataclasses import asdict, dataclass

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.config.constraints import check as rules
from endprompt_megatron.config.recipe import Recipe
from endprompt_megatron.distributed.hardware import Hardware
from endprompt_megatron.model.longlora import checkpoint_bytes
from endprompt_megatron.model.shape import ModelShape
from endprompt_megatron.plan.estimate import Estimate, estimate, min_gpus
from endprompt_megatron.plan.memory import GIB, StageMemory, memory
from endprompt_megatron.plan.search import full_length, remedies
from endprompt_megatron.plan.step_time import EFFICIENCY, NODE

__all__ = ["GIB", "Estimate", "Plan", "StageMemory", "estimate", "make_plan", "memory", "min_gpus"]


DISK = 5e9  # bytes/s: a parallel file system that others use too


@dataclass(frozen=True)
class Plan:
    """An estimate with everything that the page shows."""

    where: str
    shape: ModelShape
    published: bool  # the shape is the published one, because model.hf was not found
    estimate: Estimate
    full: Estimate | None  # full-length training to the same target in its best layout; None if that is the recipe
    remedies: list[tuple[list[str], Estimate]]  # keys to set and the resulting estimate; nearest first
    warnings: list[str]
    disk: float = DISK  # bytes/s that all ranks together write to checkpoint.dir

    def as_dict(self) -> dict:
        full = self.full.as_dict() | {"gpu_hours_same_samples": self.full_same_samples} if self.full else None
        return {
            "recipe": self.where,
            "shape": asdict(self.shape) | {"parameters": self.shape.parameters, "published": self.published},
            "checkpoint_gib": self.checkpoint_bytes / GIB,
            "checkpoint_seconds": self.checkpoint_seconds,
            "signal_seconds": self.signal_seconds,
            **self.estimate.as_dict(),
            "full_length": full,
            "remedies": [{"set": keys, **estimate.as_dict()} for keys, estimate in self.remedies],
            "warnings": self.warnings,
            "efficiency": asdict(EFFICIENCY),
        }

    @property
    def checkpoint_bytes(self) -> float:
        """A checkpoint with its optimizer: the weights, float32 master weights and two moments."""
        recipe = self.estimate.recipe
        return checkpoint_bytes(self.shape, recipe.longlora, 2 if recipe.precision.dtype == "bfloat16" else 4)

    @property
    def checkpoint_seconds(self) -> float:
        """How long a checkpoint is written."""
        return self.checkpoint_bytes / self.disk

    @property
    def signal_seconds(self) -> int:
        """How long before its time limit a job should be signalled: a save under way, a step and the last save."""
        return 60 * math.ceil((2 * self.checkpoint_seconds + self.estimate.step_seconds) / 60 + 1)

    @property
    def full_same_samples(self) -> float:
        """GPU-hours of full-length training over as many sequences as the recipe's."""
        recipe = self.estimate.recipe
        return self.full.gpu_hours_of(recipe.train.steps * recipe.train.global_batch_size * recipe.context.target)


def make_plan(
    recipe: Recipe,
    where: str,
    shape: ModelShape,
    hardware: Hardware,
    gpus: int | None = None,
    published: bool = False,
    disk: float = DISK,
) -> Plan:
    """The plan of a recipe on `gpus` GPUs, by default on the fewest on which its layout fits.

    Raises InputError if the recipe is not legal on them.
    """
    if hardware.gpu is None:
        raise InputError(f"{where}: a plan is for GPUs; choose a kind with --gpu")
    count = gpus or min_gpus(recipe)
    rules.check_for(recipe, where, shape, world_size=count, hardware=hardware)
    ours = estimate(shape, recipe, hardware.gpu, count)
    if gpus is None and not ours.fits:
        ours = _on_more(shape, recipe, hardware) or ours
    return Plan(
        where=where,
        shape=shape,
        published=published,
        estimate=ours,
        full=full_length(shape, recipe, hardware, ours.gpus)
        if recipe.context.physical < recipe.context.target and recipe.context.rope.type != "keep"
        else None,
        remedies=[] if ours.fits else remedies(shape, recipe, hardware, ours.gpus),
        warnings=_warnings(ours, gpus),
        disk=disk,
    )


def _on_more(shape: ModelShape, recipe: Recipe, hardware: Hardware) -> Estimate | None:
    """The estimate with the fewest data-parallel replicas, a power of two, with which the recipe fits; None if none."""
    replicas = 2
    while replicas <= recipe.train.global_batch_size // recipe.train.micro_batch_size:
        count = replicas * min_gpus(recipe)
        try:
            rules.check_for(recipe, "", shape, world_size=count, hardware=hardware)
        except InputError:
            return None
        found = estimate(shape, recipe, hardware.gpu, count)
        if found.fits:
            return found
        replicas *= 2
    return None


def _warnings(ours: Estimate, gpus: int | None) -> list[str]:
    p, precision = ours.recipe.parallel, ours.recipe.precision
    found = []
    if gpus is None:
        found.append(
            f"planned for the fewest GPUs that the layout {'fits on' if ours.fits else 'needs'}, {ours.gpus} with data "
            f"parallel {ours.replicas}; --nodes N plans for yours"
        )
    free = ours.gpu.memory_gib - ours.fullest.total / GIB
    if ours.fits and free < 4:
        found.append(f"{free:.1f} GiB to spare on the fullest GPU is within this estimate's uncertainty")
    if ours.gpus > NODE and ours.gpus % NODE:
        found.append(f"{ours.gpus} GPUs do not fill nodes of {NODE}")
    if p.tensor > NODE:
        found.append(f"parallel.tensor={p.tensor} exceeds a node: its communication crosses the network")
    share = ours.work.bubble / ours.work.total
    if share > 0.1:
        remedy = "more micro-batches per replica or more virtual stages reduce that"
        found.append(f"the pipeline is idle for {share:.0%} of a step ({ours.micro_batches} micro-batches): {remedy}")
    share = ours.work.tensor / ours.work.total
    if share > 0.1 and not p.overlap_tensor:
        found.append(
            f"tensor-parallel communication is {share:.0%} of a step: parallel.overlap_tensor=true hides most of it"
        )
    if p.recompute == "selective":
        found.append("parallel.recompute=selective saves almost nothing: flash attention keeps no scores")
    if p.recompute == "full" and ours.fullest.total < 0.6 * ours.gpu.memory_gib * GIB:
        found.append("there is memory to spare: parallel.recompute=block or none would be faster")
    if precision.fp8 is None and ours.gpu.fp8 and precision.dtype == "float32":
        found.append("precision.dtype=float32 leaves the tensor cores unused: bfloat16 is many times faster")
    if precision.fp8_attention:
        found.append("FP8 attention is timed at 1.4 times the speed of BF16, which no published measurement confirms")
    return found
