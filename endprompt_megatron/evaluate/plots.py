"""Pictures of evaluation results.  Every function draws into the axes it is given; the report draws the same ones.

A palette names what a colour is for, so that the report can hand over colours that follow the reader's light or
dark mode.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELS = {"untrained": "interpolated, untrained"}


@dataclass(frozen=True)
class Palette:
    """Colours by purpose."""

    ink: str = "#20242a"
    muted: str = "#6b7280"
    grid: str = "#dfe3e8"
    baseline: str = "#8a94a3"
    extended: str = "#1765b0"
    control: str = "#b8651b"
    untrained: str = "#8f6bb3"

    def of(self, label: str) -> str:
        """The colour of a model."""
        return getattr(self, label, self.ink)

    def line(self, label: str) -> dict:
        """How a model's line is drawn, and what it is called."""
        return {
            "label": LABELS.get(label, label),
            "color": self.of(label),
            "marker": MARKERS.get(label, "o"),
            "linestyle": DASHES.get(label, "-"),
            "markersize": 4,
            "linewidth": 1.7,
        }


PAPER = Palette()
MARKERS = {"baseline": "s", "extended": "o", "control": "^", "untrained": "D"}  # told apart without colour too
DASHES = {"baseline": (0, (4, 2)), "extended": "-", "control": (0, (1, 1.2)), "untrained": "-."}


def short(tokens: float) -> str:
    """8192 as 8K, 12000 as 12,000, 500 as 500."""
    tokens = int(tokens)
    return f"{tokens // 1024}K" if tokens >= 1024 and tokens % 1024 == 0 else f"{tokens:,}"


def of_suite(results: dict, suite: str) -> list[tuple[str, dict]]:
    """(label, measurement) of every model that the suite was run on."""
    return [(label, measured[suite]) for label, measured in results["measurements"].items() if suite in measured]


def dress(axes: "Axes", palette: Palette, title: str, x: str, y: str) -> None:
    """Quiet axes: no box, faint horizontal grid, title to the left in place of a y label."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(palette.muted)
    axes.tick_params(colors=palette.muted, length=0, labelsize=8.5)
    axes.tick_params(axis="x", length=3)
    axes.grid(axis="y", color=palette.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_title(title, loc="left", color=palette.ink, fontsize=10, pad=20, fontweight="bold")
    axes.text(0, 1.03, y, transform=axes.transAxes, color=palette.muted, fontsize=8.5)
    axes.set_xlabel(x, color=palette.muted, fontsize=8.5)


def legend(axes: "Axes", palette: Palette, **options: object) -> None:
    """Frameless; left out where one line needs no name, below the axes where many would cover the lines."""
    count = len(axes.get_legend_handles_labels()[0])
    if count > 3:
        options = {"loc": "upper left", "bbox_to_anchor": (0, -0.2), "ncols": 2} | options
    if count > 1:
        axes.legend(frameon=False, fontsize=8.5, labelcolor=palette.ink, **options)


def level_axis(axes: "Axes", values: list[float]) -> None:
    """A logarithmic y axis with plain numbers where `values` span a lot, a linear one where they do not."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if min(values) <= 0 or max(values) / min(values) < 3:
        return
    axes.set_yscale("log")
    span = max(values) / min(values)
    subs = (1, 1.5, 2, 3, 5, 7) if span < 12 else (1, 2, 5) if span < 120 else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:g}"))


def length_axis(axes: "Axes", lengths: list[int]) -> None:
    """Lengths on a logarithmic x axis, each measured one named unless two would overlap."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log", base=2)
    named: list[int] = []
    for length in reversed(lengths):
        if not named or named[-1] / length > (lengths[-1] / lengths[0]) ** 0.09:
            named.append(length)
    axes.set_xticks(named, [short(length) for length in named])
    axes.xaxis.set_minor_locator(NullLocator())


def window_mark(axes: "Axes", results: dict, palette: Palette) -> None:
    """A dotted line where the baseline's own window ends."""
    window = results["models"].get("baseline", {}).get("window")
    low, high = axes.get_xlim()
    if window and low < window < high:
        axes.axvline(window, color=palette.muted, linewidth=0.9, linestyle=(0, (1, 2)))
        options = {"ha": "center", "va": "bottom", "fontsize": 7.5, "color": palette.muted}
        axes.annotate("base window", (window, 1.0), xycoords=("data", "axes fraction"), **options)


def by_length(axes: "Axes", results: dict, palette: Palette = PAPER) -> None:
    """Perplexity of the last tokens against the length of the input, with standard errors."""
    import math

    values, lengths, scored = [], [], 0
    for label, measured in of_suite(results, "perplexity"):
        entries, scored = measured["by_length"], measured["scored"]
        lengths = [entry["length"] for entry in entries]
        middle = [entry["perplexity"] for entry in entries]
        # The error is of the loss, so its bounds are not symmetric once exponentiated.
        low = [p * (1 - math.exp(-(e["stderr"] or 0))) for p, e in zip(middle, entries, strict=True)]
        high = [p * (math.exp(e["stderr"] or 0) - 1) for p, e in zip(middle, entries, strict=True)]
        axes.errorbar(lengths, middle, [low, high], capsize=2, **palette.line(label))
        values += middle
    level_axis(axes, values)
    length_axis(axes, lengths)
    dress(axes, palette, "Perplexity by length", "tokens in the input", f"last {scored} tokens")
    window_mark(axes, results, palette)
    legend(axes, palette)


def by_position(axes: "Axes", results: dict, palette: Palette = PAPER) -> None:
    """Perplexity along the longest input, with bands of 95% where there are several inputs."""
    import math

    from matplotlib.ticker import FuncFormatter, MultipleLocator

    values, end = [], 1
    for label, measured in of_suite(results, "perplexity"):
        buckets = measured["by_position"]
        end = buckets[-1]["end"]
        middle = [bucket["perplexity"] for bucket in buckets]
        style = palette.line(label) | {"marker": None}
        places = [(bucket["start"] + bucket["end"]) / 2 for bucket in buckets]
        axes.plot(places, middle, **style)
        if all(bucket["stderr"] is not None for bucket in buckets):
            bounds = [
                [math.exp(min(bucket["loss"] + sign * 1.96 * bucket["stderr"], 700)) for bucket in buckets]
                for sign in (-1, 1)
            ]
            axes.fill_between(places, *bounds, color=style["color"], alpha=0.15, linewidth=0)
        values += middle
    level_axis(axes, values)
    axes.set_xlim(0, end)
    step = 2 ** max(0, (end // 5).bit_length())
    axes.xaxis.set_major_locator(MultipleLocator(step))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    dress(axes, palette, "Perplexity by position", "position in the input", f"inputs of {end:,} tokens")
    window_mark(axes, results, palette)
    legend(axes, palette)


def virtual_distance(
    axes: "Axes", results: dict, kind: str = "repeat", quantity: str = "loss", palette: Palette = PAPER
) -> None:
    """Loss or accuracy of the virtual-distance probe against the virtual length."""
    every, physical = set(), 0
    for label, measured in of_suite(results, "virtual"):
        probe, physical = measured[kind], measured["physical"]
        distances = [int(distance) for distance in probe]
        axes.plot(distances, [entry[quantity] for entry in probe.values()], **palette.line(label))
        every |= set(distances)
    length_axis(axes, sorted(every))
    what = {"repeat": "Recalling a passage", "continue": "Going on with the text"}[kind]
    unit = {"loss": "loss, nats a token", "accuracy": "share of tokens right"}[quantity]
    dress(axes, palette, f"{what} at a virtual distance", f"virtual length, {physical} physical tokens", unit)
    window_mark(axes, results, palette)
    legend(axes, palette)


def passkey(axes: "Axes", cells: list[dict], title: str, palette: Palette = PAPER) -> None:
    """Heat map of passkey accuracy: lengths across, depths down."""
    import numpy as np

    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    grid = np.full((len(depths), len(lengths)), np.nan)
    for cell in cells:
        grid[depths.index(cell["depth"]), lengths.index(cell["length"])] = cell["accuracy"]
    axes.imshow(grid, cmap="Blues", vmin=0, vmax=1.25, aspect="auto")
    for (row, column), value in np.ndenumerate(grid):
        colour = "white" if value > 0.6 else palette.ink
        axes.text(column, row, f"{value:.0%}", ha="center", va="center", color=colour, fontsize=9)
    axes.set_xticks(range(len(lengths)), [short(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    dress(axes, palette, title, "tokens in the input", "depth of the key")
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
