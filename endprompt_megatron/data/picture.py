"""Rows of training tokens as a picture: position ids over physical places, documents and loss weights beneath."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from endprompt_megatron.config import Recipe
from endprompt_megatron.data.dataset import Dataset
from endprompt_megatron.data.inspect import documents_in
from endprompt_megatron.data.segments import PADDING, PROMPT, Segment, segments, weight_runs
from endprompt_megatron.evaluate.plots import PAPER, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SAMPLES = (PAPER.extended, PAPER.untrained, "#2f8f6b")  # of a packed row, in turn
_PAD = "#eceef1"


def draw(dataset: Dataset, indices: list[int], recipe: Recipe, path: Path) -> None:
    """Draw the rows `indices` of a training dataset into a .png, one below the other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"font.size": 8.5, "font.family": "sans-serif"}):
        figure = pyplot.figure(figsize=(9.5, 4.6 * len(indices)), layout="constrained", dpi=150)
        grid = figure.add_gridspec(3 * len(indices), 1, height_ratios=[12, 1, 1] * len(indices))
        for number, index in enumerate(indices):
            source, place = dataset.locate(index)
            row = source[place]
            main = figure.add_subplot(grid[3 * number])
            strips = [figure.add_subplot(grid[3 * number + below], sharex=main) for below in (1, 2)]
            epoch = place // source.windows.count + 1
            title = f"Sample {index:,} of the run: number {place:,} of {source.prefix}, epoch {epoch}"
            positions(main, row, recipe.context.target, recipe.context.original, title)
            documents(strips[0], documents_in(source, place, row), len(row["tokens"]))
            loss_weights(strips[1], row)
            strips[1].set_xlabel("place in the row", color=PAPER.muted)
        figure.savefig(path)
        pyplot.close(figure)


def positions(axes: "Axes", row: dict[str, Any], target: int, original: int | None, title: str) -> None:
    """Position id of every token: a line for each contiguous run, the terminal prompt named, the jump dotted."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    length = len(row["tokens"])
    found = segments(row)
    packed = len({segment.sample for segment in found} - {-1}) > 1
    if original and original < target:
        axes.axhspan(0, original, color="#f3f6fa", linewidth=0)
        _note(axes, (1, original), f"the model's own window, {original:,} ", va="bottom", ha="right")
    axes.axhline(target - 1, color=PAPER.muted, linewidth=0.8, linestyle=(0, (4, 3)))
    _note(axes, (1, target - 1), f"end of the target window, L - 1 = {target - 1:,} ", va="bottom", ha="right")
    last: tuple[int, int, int] | None = None  # place, position and sample of the token before
    for segment in found:
        if segment.kind == PADDING:
            axes.axvspan(segment.start, segment.stop, facecolor=_PAD, edgecolor=PAPER.muted, hatch="//", linewidth=0)
            continue
        colour = PAPER.control if segment.kind == PROMPT else _SAMPLES[segment.sample % len(_SAMPLES)]
        at = segment.start
        for first, end in segment.positions:
            if last and last[2] == segment.sample:
                axes.plot([last[0], at], [last[1], first], color=PAPER.muted, linewidth=0.8, linestyle=(0, (1, 2)))
            stop = at + end - first
            axes.plot([at, stop], [first, end], color=colour, linewidth=2.2, solid_capstyle="butt")
            if stop - at < length / 100:  # a prompt of ten tokens among thousands would be a speck
                axes.plot([(at + stop) / 2], [(first + end) / 2], "o", color=colour, markersize=5 if not packed else 3)
            last = (stop, end, segment.sample)
            at = stop + 1
    if not packed:
        for segment in found:
            _name(axes, segment, length, target)
    axes.set_xlim(0, length)
    axes.set_ylim(-0.03 * target, 1.12 * target)
    axes.tick_params(labelbottom=False)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 4, 5, 8, 10]))
    axes.set_yticks(np.linspace(0, target, 5 if target % 4 == 0 else 2))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    _dress(axes)
    axes.grid(axis="y", color=PAPER.grid, linewidth=0.6)
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=PAPER.ink, pad=18)
    axes.text(0, 1.02, "position id", transform=axes.transAxes, color=PAPER.muted)


def _name(axes: "Axes", segment: Segment, length: int, target: int) -> None:
    """Says what a segment is, beside it."""
    first, last = segment.positions[0][0], segment.positions[-1][1]
    words = f"{len(segment):,} tokens, positions {first:,} to {last:,}"
    if segment.kind == PROMPT:
        place = ((segment.start + segment.stop) / 2, (first + last) / 2)
        high = place[1] > 0.3 * target
        axes.annotate(
            f"terminal prompt\n{words}",
            place,
            xytext=(-28, -30 if high else 40),
            textcoords="offset points",
            ha="right",
            va="center",
            color=PAPER.control,
            arrowprops={"arrowstyle": "-", "color": PAPER.control, "linewidth": 0.8, "shrinkB": 4},
        )
    elif segment.kind != PADDING:
        chunks = f" in {len(segment.positions)} chunks" if len(segment.positions) > 1 else ""
        middle = first + (last - first) * 0.35
        high = middle + 0.18 * target
        options = {"ha": "center", "va": "center", "color": PAPER.extended}
        axes.text(0.35 * length, min(high, 0.8 * target), f"context{chunks}\n{words}", **options)


def documents(axes: "Axes", pieces: list[dict[str, int]], length: int) -> None:
    """A strip of the documents of a row in two greys; where two meet one ends, and a short mark stands there."""
    for number, piece in enumerate(pieces):
        axes.axvspan(piece["start"], piece["stop"], color=("#c9d1db", "#e3e8ee")[number % 2], linewidth=0)
        if piece["stop"] - piece["start"] > length / 12:
            words = f"#{piece['document']:,}"
            axes.text((piece["start"] + piece["stop"]) / 2, 0.5, words, ha="center", va="center", color=PAPER.ink)
        if piece["start"]:
            axes.axvline(piece["start"], color=PAPER.ink, linewidth=0.9)
    count = f"{len(pieces)} document{'s' * (len(pieces) > 1)}"
    _strip(axes, count)


def loss_weights(axes: "Axes", row: dict[str, Any]) -> None:
    """A strip of the loss weights: the darker the heavier, with the number where there is room, 0 white."""
    runs = weight_runs(row)
    most = max((weight for *_, weight in runs), default=1.0) or 1.0
    length = len(row["loss_weights"])
    for start, stop, weight in runs:
        axes.axvspan(
            start, stop, color=PAPER.extended, alpha=0.12 + 0.6 * weight / most if weight else 0.0, linewidth=0
        )
        if stop - start > length / 25:
            axes.text((start + stop) / 2, 0.5, f"{weight:g}", ha="center", va="center", color=PAPER.ink)
    values = sorted({weight for *_, weight in runs}, reverse=True)
    _strip(axes, "loss weight" + (f" ({', '.join(f'{value:g}' for value in values)})" if len(values) <= 4 else ""))


def _strip(axes: "Axes", name: str) -> None:
    from matplotlib.ticker import FuncFormatter

    axes.set_ylim(0, 1)
    axes.set_yticks([0.5], [name])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    _dress(axes)
    axes.spines["left"].set_visible(False)


def _dress(axes: "Axes") -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(PAPER.muted)
    axes.tick_params(colors=PAPER.muted, length=0)
    axes.set_axisbelow(True)


def _note(axes: "Axes", place: tuple[float, float], text: str, **options: str) -> None:
    axes.text(*place, text, transform=axes.get_yaxis_transform(), color=PAPER.muted, fontsize=8, **options)
