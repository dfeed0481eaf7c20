"""What a recipe costs on a number of GPUs: memory of each stage, time of a step, GPU-hours.

`estimate` puts memory.py and step_time.py together.  Arithmetic; no torch, no Megatron.
"""

from dataclasses import asdict, dataclass

from endprompt_megatron.config.recipe import Recipe
from endprompt_megatron.distributed.hardware import Gpu
from endprompt_megatron.model.flops import flops_per_token
from endprompt_megatron.model.shape import ModelShape
from endprompt_megatron.plan.memory import GIB, StageMemory, memory
from endprompt_megatron.plan.step_time import EFFICIENCY, Clock, Efficiency, Work


@dataclass(frozen=True)
class Estimate:
    """A recipe on a number of GPUs: memory of each stage and time of a step."""

    recipe: Recipe
    gpus: int
    gpu: Gpu
    stages: list[StageMemory]
    work: Work
    flops: float  # per token

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
        """Model TFLOP/s per GPU; recomputation is not counted."""
        return self.tokens_per_gpu_second * self.flops / 1e12

    @property
    def tokens(self) -> int:
        """Tokens of the complete run."""
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


def estimate(
    shape: ModelShape,
    recipe: Recipe,
    gpu: Gpu,
    gpus: int,
    stages: list[StageMemory] | None = None,
    efficiency: Efficiency = EFFICIENCY,
) -> Estimate:
    """Memory and time of a legal recipe on `gpus` GPUs of one kind.  `stages`: the memory, if already computed.

    Raises InputError for a GPU of unknown speed.
    """
    return Estimate(
        recipe=recipe,
        gpus=gpus,
        gpu=gpu,
        stages=stages or memory(shape, recipe, gpus),
        work=Clock(shape, recipe, gpu, gpus, efficiency).step(),
        flops=flops_per_token(shape, recipe.context.physical, recipe.longlora),
    )


def min_gpus(recipe: Recipe) -> int:
    """The GPUs that the recipe's layout needs at least: one data-parallel replica."""
    p = recipe.parallel
    return p.tensor * p.pipeline * p.context
