"""A dry run as one HTML page: memory over the step, traffic by group, what the host waits for."""

import functools
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from endprompt_megatron.common.html_page import WIDE, Figure, Page, Paragraph, Row, Section, Table, render
from endprompt_megatron.common.plotting import PAGE, dress
from endprompt_megatron.dry_run.rank_step import Step
from endprompt_megatron.dry_run.target import Target

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GIB = 2**30


def html(step: Step, target: Target) -> str:
    """The page, self-contained."""
    p, planned = target.recipe.parallel, target.planned[step.stage]
    name = Path(target.recipe.model.hf).name
    memory = [
        Figure(
            functools.partial(draw_memory, step=step, planned=planned.allocated / GIB),
            "Memory over a step",
            "The most that lives at each share of the step's matrix products, with the optimizer's state as every step "
            "but the first has it. The update makes no matrix products: it is the last point.",
            WIDE,
        ),
        Table(
            ["this rank", "planned"],
            [
                Row("parameters", [f"{step.parameters:,}", f"{planned.parameters:,}"]),
                Row("before the step", [_gib(step.built), ""]),
                Row("the optimizer's state", [_gib(step.state), ""]),
                Row("peak", [_gib(step.peak), _gib(planned.allocated)]),
            ],
        ),
    ]
    traffic = [
        Figure(functools.partial(draw_traffic, step=step), "Bytes of a step by group", size=WIDE),
        Table(
            ["group", "count", "bytes"],
            [
                Row(operation, [group, f"{count:,}", _gib(size)])
                for (operation, group), (count, size) in step.traffic.items()
            ],
            first="operation",
        ),
    ]
    waits = [Row(line, [kind, f"{count:,}"]) for (kind, line), count in step.syncs.most_common()]
    return render(
        Page(
            title=f"{name}, rank {step.rank} of {step.world_size}: a step without a GPU",
            heading=f"{name}, rank {step.rank} of {step.world_size}",
            kind="A step without a GPU",
            facts=[
                ("layout", f"TP{p.tensor} PP{p.pipeline} CP{p.context}"),
                ("pipeline stage", str(step.stage)),
                ("layers", "+".join(map(str, step.layers))),
                ("micro-batches", str(step.micro_batches)),
                ("FLOPs of matrix products", f"{step.flops:.3e}"),
            ],
            sections=[
                Section("memory", "Memory", memory),
                Section("traffic", "Traffic", traffic),
                Section(
                    "waits",
                    "What the host reads from the device in forward and backward",
                    [Table(["kind", "count"], waits, first="line")] if waits else [Paragraph("Nothing.")],
                ),
            ],
        )
    )


def draw_memory(axes: "Axes", step: Step, planned: float) -> None:
    """GiB over the share of the step's matrix products, beside the plan."""
    shares, sizes = zip(*step.memory, strict=True)
    gib = [size / GIB for size in sizes]
    axes.fill_between(shares, gib, 0, step="post", color=PAGE.extended, alpha=0.2, linewidth=0)
    axes.step(shares, gib, where="post", color=PAGE.extended, linewidth=1.2)
    axes.axhline(planned, color=PAGE.control, linewidth=1, linestyle=(0, (4, 2)))
    axes.annotate("planned peak", (0, planned), xytext=(2, 3), textcoords="offset points", color=PAGE.control)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.12 * max(*gib, planned))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    dress(axes, PAGE, "Memory over a step", "matrix products done", "GiB")


def draw_traffic(axes: "Axes", step: Step) -> None:
    """GiB that this rank takes part in, by group."""
    groups: Counter[str] = Counter()
    for (_, group), (_, size) in step.traffic.items():
        groups[group] += size
    names, sizes = zip(*reversed(groups.most_common()), strict=True)
    axes.barh(names, [size / GIB for size in sizes], color=PAGE.extended, height=0.6)
    dress(axes, PAGE, "Traffic of a step by group", "GiB", "")


def _gib(count: float) -> str:
    return f"{count / GIB:,.3f} GiB"
