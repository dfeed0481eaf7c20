"""What a recipe costs before it runs: FLOPs, memory a GPU, time, GPU-hours, and what full length would cost.

`make_plan` puts together memory.py and step_time.py for a shape, a recipe and a number of GPUs;
search.py looks for layouts, page.py prints.  Arithmetic; no torch, no Megatron.
"""

from dataclasses import asdict, dataclass

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.config.constraints import check as rules
from endprompt_megatron.config.recipe import LongLora, Recipe
from endprompt_megatron.distributed.hardware import Gpu, Hardware
from endprompt_megatron.model.longlora import (
    adapter_elements,
    checkpoint_bytes,
    output_is_trained,
    seen_tokens,
)
from endprompt_megatron.model.shape import ModelShape
from endprompt_megatron.plan.memory import GIB, StageMemory, memory
from endprompt_megatron.plan.step_time import EFFICIENCY, NODE, Clock, Work


def flops_per_token(shape: ModelShape, length: int, longlora: LongLora | None = None) -> float:
    """Training FLOPs a token (forward and backward) of a causal sequence of `length` tokens.

    Six a weight of every matrix that a token passes (the embedding lookup is none, the output layer is), four of
    one that LoRA leaves frozen, and for attention 12 * layers * heads * head_dim a token seen: half the sequence on
    average, fewer where it is shifted.
    """
    longlora = longlora or LongLora()
    attention = shape.hidden_size * shape.head_dim * (2 * shape.num_heads + 2 * shape.num_kv_heads)
    matrices = shape.num_layers * (attention + 3 * shape.hidden_size * shape.ffn_size)
    output = shape.vocab_size * shape.hidden_size
    scores = 12 * shape.num_layers * shape.num_heads * shape.head_dim * seen_tokens(longlora, length)
    if not longlora.rank:
        return 6.0 * (matrices + output) + scores
    adapters = shape.num_layers * adapter_elements(shape, longlora.rank)
    return 4.0 * matrices + 6.0 * adapters + (6 if output_is_trained(shape, longlora) else 4) * output + scores


@dataclass(frozen=True)
class Estimate:
    """A recipe on so many GPUs: the fullest GPU and the time of a step."""

    recipe: Recipe
    gpus: int
    gpu: Gpu
    stages: list[StageMemory]
    work: Work
    flops: float  # of a token

    @property
    def replicas(self) -> int:
        p = self.recipe.parallel
        return self.gpus // (p.tensor * p.pipeline * p.context)

    @property
    def micro_batches(self) -> int:
        return self.recipe.train.global_batch_size // (self.recipe.train.micro_batch_size * self.replicas)

    @property
    def fullest(self) -> StageMemory:
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def fits(self) -> bool:
        return self.fullest.total <= self.gpu.memory_gib * GIB

    @property
    def step_seconds(self) -> float:
        return self.work.total

    @property
    def tokens_per_gpu_second(self) -> float:
        return self.recipe.tokens_per_step / self.step_seconds / self.gpus

    @property
    def tflops(self) -> float:
        """Model TFLOP/s a GPU: recomputation is not counted."""
        return self.tokens_per_gpu_second * self.flops / 1e12

    @property
    def tokens(self) -> int:
        """Of the whole run."""
        return self.recipe.train.steps * self.recipe.tokens_per_step

    @property
    def hours(self) -> float:
        return self.recipe.train.steps * self.step_seconds / 3600

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.gpus

    def gpu_hours_of(self, tokens: float) -> float:
        return tokens / self.tokens_per_gpu_second / 3600

    def as_dict(self) -> dict:
        p = self.recipe.parallel
        return {
            "gpus": self.gpus,
            "gpu": self.gpu.name,
            "gpu_memory_gib": self.gpu.memory_gib,
            "parallel": asdict(p) | {"data": self.replicas},
            "micro_batches": self.micro_batches,
            "physical": self.recipe.context.physical,
            "global_batch_size": self.recipe.train.global_batch_size,
            "fits": self.fits,
            "stages": [stage.as_dict() for stage in self.stages],
            "step_seconds": self.step_seconds,
            "seconds_by_kind": self.work.as_dict(),
            "tokens_per_s_per_gpu": self.tokens_per_gpu_second,
            "flops_per_token": self.flops,
            "flops_per_step": self.flops * self.recipe.tokens_per_step,
            "tflops_per_gpu": self.tflops,
            "mfu": self.tflops * 1e12 / self.gpu.bf16,
            "steps": self.recipe.train.steps,
            "tokens": self.tokens,
            "hours": self.hours,
            "gpu_hours": self.gpu_hours,
        }


@dataclass(frozen=True)
class Plan:
    """An estimate with what belongs around it on the page."""

    where: str
    shape: ModelShape
    published: bool  # the shape is the published one, model.hf is not here
    estimate: Estimate
    full: Estimate | None  # full-length training for the same target in its best layout; None where it is the recipe
    remedies: list[tuple[list[str], Estimate]]  # keys to change, what they give; nearest first
    warnings: list[str]

    def as_dict(self) -> dict:
        full = self.full.as_dict() | {"gpu_hours_same_samples": self.full_same_samples} if self.full else None
        return {
            "recipe": self.where,
            "shape": asdict(self.shape) | {"parameters": self.shape.parameters, "published": self.published},
            "checkpoint_gib": self.checkpoint_bytes / GIB,
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
    def full_same_samples(self) -> float:
        """GPU-hours of full-length training over as many sequences as the recipe's."""
        recipe = self.estimate.recipe
        return self.full.gpu_hours_of(recipe.train.steps * recipe.train.global_batch_size * recipe.context.target)


def estimate(
    shape: ModelShape, recipe: Recipe, gpu: Gpu, gpus: int, stages: list[StageMemory] | None = None
) -> Estimate:
    """Memory (`stages`, where it is known) and time of a legal recipe on so many GPUs of that kind.

    Raises InputError for a GPU whose speed is not known.
    """
    return Estimate(
        recipe=recipe,
        gpus=gpus,
        gpu=gpu,
        stages=stages or memory(shape, recipe, gpus),
        work=Clock(shape, recipe, gpu, gpus).step(),
        flops=flops_per_token(shape, recipe.context.physical, recipe.longlora),
    )


def least_gpus(recipe: Recipe) -> int:
    """What the recipe's layout needs: one data-parallel replica."""
    p = recipe.parallel
    return p.tensor * p.pipeline * p.context


def make_plan(
    recipe: Recipe, where: str, shape: ModelShape, hardware: Hardware, gpus: int | None = None, published: bool = False
) -> Plan:
    """The plan of a recipe on `gpus` GPUs, by default on the fewest that its layout fits on.

    Raises InputError where the recipe is not legal on them.
    """
    from endprompt_megatron.plan.search import full_length, remedies

    if hardware.gpu is None:
        raise InputError(f"{where}: a plan is for GPUs; choose a kind with --gpu")
    count = gpus or least_gpus(recipe)
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
    )


def _on_more(shape: ModelShape, recipe: Recipe, hardware: Hardware) -> Estimate | None:
    """The estimate with the fewest data-parallel replicas, a power of two, that share the optimizer well enough."""
    replicas = 2
    while replicas <= recipe.train.global_batch_size // recipe.train.micro_batch_size:
        count = replicas * least_gpus(recipe)
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
        found.append(f"{free:.1f} GiB to spare on the fullest GPU is less than this estimate is sure of")
    if ours.gpus > NODE and ours.gpus % NODE:
        found.append(f"{ours.gpus} GPUs are not whole nodes of {NODE}")
    if p.tensor > NODE:
        found.append(f"parallel.tensor={p.tensor} leaves the node: its communication goes over the network")
    share = ours.work.bubble / ours.work.total
    if share > 0.1:
        remedy = "more micro-batches a replica or more virtual stages make it smaller"
        found.append(
            f"the pipeline stands still for {share:.0%} of a step ({ours.micro_batches} micro-batches): {remedy}"
        )
    share = ours.work.tensor / ours.work.total
    if share > 0.1 and not p.overlap_tensor:
        found.append(f"tensor-parallel communication is {share:.0%} of a step: parallel.overlap_tensor=true hides most")
    if p.recompute == "selective":
        found.append("parallel.recompute=selective saves next to nothing: flash attention keeps no scores")
    if p.recompute == "full" and ours.fullest.total < 0.6 * ours.gpu.memory_gib * GIB:
        found.append("there is memory to spare: parallel.recompute=block or none would be faster")
    if precision.fp8 is None and ours.gpu.fp8 and precision.dtype == "float32":
        found.append("precision.dtype=float32 leaves the tensor cores unused: bfloat16 is many times faster")
    if precision.fp8_attention:
        found.append("FP8 attention is timed at 1.4 times BF16's speed, which no published table here confirms")
    return found
