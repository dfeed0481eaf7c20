"""What a run took, from its metrics, and what the planner says of its recipe on as many GPUs."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.html_page import Row
from endprompt_megatron.common.units import format_duration, format_number
from endprompt_megatron.report.run_files import Run

if TYPE_CHECKING:
    from endprompt_megatron.plan.plan import Estimate

NONE = "–"


@dataclass(frozen=True)
class Spent:
    """What the logged steps say.  Seconds are of steps: validation, checkpoints and restarts are not in them."""

    steps: int
    tokens: int | None
    seconds: float | None
    processes: int | None  # of the last step; None in runs that did not write it down
    process_seconds: float | None
    tokens_per_s: float | None  # median
    tflops: float | None  # median, a process
    mfu: float | None  # median; None on CPUs
    memory_gib: float | None  # most, of the first process

    @property
    def gpus(self) -> bool:
        """Whether the processes were GPUs, as far as the metrics tell."""
        return self.mfu is not None


def spent(run: Run) -> Spent:
    """The cost of a run with logged steps; a step that was not logged counts as the next one that was."""
    seconds = process_seconds = 0.0
    complete = True
    before = 0
    for line in run.steps:
        taken = line.get("step_time_s")
        count = max(line["step"] - before, 0)
        before = line["step"]
        if not isinstance(taken, int | float):
            complete = False
            continue
        seconds += taken * count
        process_seconds += taken * count * (line.get("processes") or 0)
    last = run.steps[-1]
    known = all(line.get("processes") for line in run.steps)
    values = {
        key: [line[key] for line in run.steps if isinstance(line.get(key), int | float)]
        for key in ("tokens_per_s", "tflops_per_gpu", "mfu", "memory_gib")
    }
    middle: Callable[[str], float | None] = lambda key: statistics.median(values[key]) if values[key] else None  # noqa: E731
    return Spent(
        steps=last["step"],
        tokens=last.get("consumed_tokens"),
        seconds=seconds if complete else None,
        processes=last.get("processes"),
        process_seconds=process_seconds if complete and known else None,
        tokens_per_s=middle("tokens_per_s"),
        tflops=middle("tflops_per_gpu"),
        mfu=middle("mfu"),
        memory_gib=max(values["memory_gib"], default=None),
    )


def spent_rows(every: Sequence[Spent]) -> list[Row]:
    """The rows of what was spent, a cell a run."""
    unit = "GPU" if every and all(each.gpus for each in every) else "process"

    def row(name: str, cell: Callable[[Spent], str | None]) -> Row:
        return Row(name, [cell(each) or NONE for each in every])

    return [
        row("steps", lambda s: f"{s.steps:,}"),
        row("tokens", lambda s: f"{s.tokens:,}" if s.tokens else None),
        row("GPUs" if unit == "GPU" else "processes", lambda s: f"{s.processes:,}" if s.processes else None),
        row("time in steps", lambda s: format_duration(s.seconds) if s.seconds else None),
        row(f"{unit}-hours", lambda s: format_number(s.process_seconds / 3600) if s.process_seconds else None),
        row("tokens a second", lambda s: f"{s.tokens_per_s:,.0f}" if s.tokens_per_s else None),
        row(
            f"tokens a second and {unit}",
            lambda s: f"{s.tokens_per_s / s.processes:,.0f}" if s.tokens_per_s and s.processes else None,
        ),
        row(f"TFLOP/s a {unit}", lambda s: format_number(s.tflops) if s.tflops else None),
        row("MFU", lambda s: f"{s.mfu:.1%}" if s.mfu is not None else None),
        row("memory, first process", lambda s: f"{s.memory_gib:.1f} GiB" if s.memory_gib else None),
    ]


@dataclass(frozen=True)
class Planned:
    """The planner's estimate, or why there is none."""

    estimate: "Estimate | None"
    reason: str = ""


def planned(run: Run, each: Spent, gpu: str = "h100") -> Planned:
    """The recipe as resolved on as many GPUs as the run had processes (its layout's least where that is not known)."""
    from endprompt_megatron.config.constraints import check as rules
    from endprompt_megatron.config.load import load_recipe
    from endprompt_megatron.distributed.hardware import of_kind
    from endprompt_megatron.model.published_shapes import shape_for
    from endprompt_megatron.plan.plan import estimate, min_gpus

    path = run.directory / "recipe.yaml"
    if not run.recipe:
        return Planned(None, "no recipe")
    try:
        recipe = load_recipe(path)
        shape, _ = shape_for(recipe.model.hf, str(path))
        count = each.processes or min_gpus(recipe)
        hardware = of_kind(gpu)
        rules.check_for(recipe, str(path), shape, world_size=count, hardware=hardware)
        return Planned(estimate(shape, recipe, hardware.gpu, count))
    except InputError as error:
        return Planned(None, str(error))


def plan_rows(plans: Sequence[Planned]) -> list[Row]:
    """The planner's rows, a cell a run."""

    def row(name: str, cell: Callable[["Estimate"], str]) -> Row:
        cells = [cell(plan.estimate) if plan.estimate else NONE for plan in plans]
        return Row(f"planned: {name}", cells, kind="paper")

    return [
        row("on", lambda e: f"{e.gpus} {e.gpu.name}"),
        row("time in steps", lambda e: format_duration(3600 * e.hours)),
        row("GPU-hours", lambda e: format_number(e.gpu_hours)),
        row("tokens a second and GPU", lambda e: f"{e.tokens_per_gpu_second:,.0f}"),
        row("MFU", lambda e: f"{e.tflops * 1e12 / e.gpu.bf16:.1%}"),
        row("memory, fullest GPU", lambda e: f"{e.fullest.total / 2**30:.1f} GiB"),
    ]


def notes(every: Sequence[Spent], plans: Sequence[Planned]) -> list[str]:
    """What the numbers do not hold."""
    words = ["Time in steps is without validation, checkpoints and restarts; speeds are medians."]
    if any(each.processes is None for each in every):
        words.append("The number of processes was not logged by every run.")
    if any(plan.estimate for plan in plans):
        words.append(
            "Planned: what `tools/plan.py` says of the recipe on as many H100, for all of its steps"
            + ("." if all(each.gpus for each in every) else "; the run was not on GPUs whose peak is known.")
        )
    reasons = {plan.reason for plan in plans if plan.reason and plan.reason != "no recipe"}
    words += [f"No plan: {reason}." for reason in sorted(reasons)]
    return words
