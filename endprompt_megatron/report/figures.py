"""The report's pictures of a training run; the suites themselves draw what an evaluation measured."""

import math
from typing import TYPE_CHECKING

import numpy as np

from endprompt_megatron.common.plotting import PAGE, Palette, dress, legend, length_axis, level_axis, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def smooth(values: list[float], weight: float = 0.85) -> list[float]:
    """Exponential moving average, corrected for its start."""
    result, total, norm = [], 0.0, 0.0
    for value in values:
        total = weight * total + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        result.append(total / norm)
    return result


def series(steps: list[dict], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of `key` where it is there and a number."""
    found = [(line["step"], line[key]) for line in steps if isinstance(line.get(key), (int, float))]
    return [step for step, _ in found], [value for _, value in found]


def losses(axes: "Axes", steps: list[dict], validations: list[dict], palette: Palette = PAGE) -> None:
    """Context and prompt loss over the steps: faint as measured, strong smoothed; validation as dots."""
    for key, name, colour, line in (
        ("loss_context", "context", palette.extended, "-"),
        ("loss_prompt", "terminal prompt", palette.control, (0, (4, 1.5))),
    ):
        x, y = series(steps, key)
        if not x:
            continue
        axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.35)
        axes.plot(x, smooth(y), color=colour, linewidth=1.8, linestyle=line, label=name)
    x, y = series(validations, "valid_loss_context")
    if x:
        axes.plot(x, y, "o", color=palette.ink, markersize=3.5, label="context, held out")
    axes.set_ylim(bottom=0)
    dress(axes, palette, "Loss", "step", "nats a token")
    legend(axes, palette)


def over_steps(
    axes: "Axes",
    lines: dict[str, tuple[list[int], list[float]]],
    title: str,
    unit: str,
    palette: Palette = PAGE,
    weight: float = 0.85,
) -> None:
    """A quantity over the steps, a line a run, smoothed by `weight` (0: as measured); `lines` by the runs' keys."""
    for key, (x, y) in lines.items():
        style = palette.line(key)
        if weight:
            axes.plot(x, y, color=style["color"], linewidth=0.7, alpha=0.25)
            style["marker"] = None
        axes.plot(x, smooth(y, weight), **style)
    dress(axes, palette, title, "step", unit)
    legend(axes, palette)


def small(axes: "Axes", steps: list[dict], key: str, title: str, unit: str, palette: Palette = PAGE) -> None:
    """One quantity over the steps, small."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    x, y = series(steps, key)
    if key == "lr" and max(y) > 0:
        exponent = math.floor(math.log10(max(y)))
        y = [value / 10.0**exponent for value in y]
        unit = "× 10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    axes.plot(x, y, color=palette.extended, linewidth=1.4)
    if key == "grad_norm" and min(y) > 0:
        level_axis(axes, y)
    else:
        axes.set_ylim(0, max(y) * 1.15 or 1)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    dress(axes, palette, title, "step", unit)


def virtual_over_training(axes: "Axes", validations: list[dict], palette: Palette = PAGE) -> None:
    """Probe loss against virtual length, one line a validation: faint at the start, full at the end."""
    probed = [line for line in validations if line.get("virtual")]
    distances: list[int] = []
    for place, line in enumerate(probed):
        distances = sorted(int(distance) for distance in line["virtual"])
        found = [line["virtual"][str(distance)]["loss"] for distance in distances]
        values = [math.nan if loss is None else loss for loss in found]  # null: not finite
        last = place == len(probed) - 1
        axes.plot(
            distances,
            values,
            color=palette.extended,
            alpha=min(1.0, 0.2 + 0.8 * (place + 1) / len(probed)),
            linewidth=1.8 if last else 1.1,
            marker="o",
            markersize=3.5 if last else 0,
            label=f"step {line['step']}" if last or place == 0 else None,
        )
    length_axis(axes, distances)
    dress(axes, palette, "Recalling at a virtual distance, while training", "virtual length", "loss, nats a token")
    legend(axes, palette)


def coverage(axes: "Axes", counts: np.ndarray, gaps: list[tuple[int, int]], palette: Palette = PAGE) -> None:
    """How often each relative distance is supervised; what is never seen is hatched."""
    from matplotlib.ticker import FuncFormatter, MultipleLocator

    length = len(counts)
    # At most 400 columns: a page with 65,536 points a curve would be slow to no one's gain.
    edges = np.unique(np.linspace(0, length, min(400, length) + 1).astype(int))
    means = np.add.reduceat(counts, edges[:-1]) / np.diff(edges)
    axes.fill_between(edges[:-1], 0, means, step="post", color=palette.extended, alpha=0.55, linewidth=0)
    axes.step(edges[:-1], means, where="post", color=palette.extended, linewidth=1.2)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(0, max(float(means.max()), 1) * 2)
    for low, high in sorted(gaps, key=lambda gap: gap[0] - gap[1])[:3]:
        if high - low > length * 0.02:
            axes.axvspan(low, high, facecolor="none", edgecolor=palette.grid, hatch="///", linewidth=0)
            if high - low > length * 0.25:
                where = ((low + high) / 2, 0.5)
                text = f"never supervised\n{low:,} to {high:,}"
                options = {"ha": "center", "va": "center", "fontsize": 8.5, "color": palette.ink}
                axes.annotate(text, where, xycoords=("data", "axes fraction"), **options)
    axes.set_xlim(0, length)
    axes.xaxis.set_major_locator(MultipleLocator(2 ** max(0, (length // 5).bit_length())))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    dress(axes, palette, "Relative distances in training", "distance between query and key", "pairs a sample")


def wavelengths(
    axes: "Axes", before: np.ndarray, after: np.ndarray, gap: tuple[int, int] | None, palette: Palette = PAGE
) -> None:
    """Tokens of a full turn of each pair of rotary dimensions, before and after scaling, and the gap's width."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    pairs = np.arange(len(after))
    base, scaled = palette.line("baseline"), palette.line("extended")
    axes.plot(pairs, before, **base | {"marker": None, "label": "before scaling"})
    axes.plot(pairs, after, **scaled | {"marker": None, "label": "after"})
    if gap is not None:
        width = gap[1] - gap[0] + 1
        axes.axhline(width, color=palette.muted, linewidth=0.9, linestyle=(0, (1, 2)))
        options = {"ha": "left", "va": "bottom", "fontsize": 7.5, "color": palette.muted}
        axes.annotate(f"the gap, {width:,} tokens", (0.01, width), xycoords=("axes fraction", "data"), **options)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(numticks=6))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    dress(axes, palette, "Wavelengths of the rotary embedding", "pair of dimensions", "tokens a turn")
    legend(axes, palette, loc="lower right")
