"""Rows of training tokens as a picture: position ids over physical places, documents and loss weights beneath.

A terminal prompt is ten tokens of thousands: to the right of each row stands its surroundings, magnified.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from endprompt_megatron.common.plotting import PAPER, bare, short
from endprompt_megatron.config.recipe import Context
from endprompt_megatron.data.describe.describe_data import documents_in
from endprompt_megatron.data.describe.segments import (
    ANSWER,
    CONTEXT,
    PADDING,
    PROMPT,
    Segment,
    samples_in,
    segments,
    weight_runs,
)
from endprompt_megatron.data.samples.dataset import Dataset

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SAMPLES = (PAPER.extended, PAPER.untrained, "#2f8f6b")  # colours of a packed row's samples, in turn
_PADDING = "#eceef1"


def draw(dataset: Dataset, indices: list[int], context: Context, path: Path) -> None:
    """Draw the rows `indices` of a training dataset into a .png, one below the other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"font.size": 8.5, "font.family": "sans-serif"}):
        figure = pyplot.figure(figsize=(10, 4.8 * len(indices)), layout="constrained", dpi=150)
        subfigures = figure.subfigures(len(indices), 1, squeeze=False, hspace=0.06)[:, 0]
        for index, subfigure in zip(indices, subfigures, strict=True):
            source, number = dataset.locate(index)
            row = source[number]
            found = segments(row)
            near = _surroundings(found)
            columns = 2 if near else 1
            grid = subfigure.add_gridspec(3, columns, height_ratios=(12, 1, 1), width_ratios=(4.4, 1)[:columns])
            for column, (low, high) in enumerate([(0, len(row["tokens"])), near][:columns]):
                main, below, lowest = (subfigure.add_subplot(grid[line, column]) for line in range(3))
                positions(main, found, context.target, context.original, (low, high))
                documents(below, documents_in(source, number), (low, high), named=column == 0)
                loss_weights(lowest, row, (low, high), named=column == 0)
                lowest.set_xlabel("place in the row" if column == 0 else "around the prompt", color=PAPER.muted)
                if column == 0:
                    epoch = source.epoch(number) + 1
                    title = f"Sample {index:,} of the run: number {number:,} of {source.prefix}, epoch {epoch}"
                    main.set_title(title, loc="left", fontsize=10, fontweight="bold", color=PAPER.ink, pad=16)
                    main.text(0, 1.02, "position id", transform=main.transAxes, color=PAPER.muted)
        figure.savefig(path)
        pyplot.close(figure)


def _surroundings(found: list[Segment]) -> tuple[int, int] | None:
    """Places around the first terminal prompt of a row; None without one, or where it fills a good part of the row."""
    prompt = next((segment for segment in found if segment.kind == PROMPT), None)
    if prompt is None or len(prompt) > found[-1].stop / 20:
        return None
    margin = max(6, len(prompt) // 2)
    return max(0, prompt.start - margin), min(found[-1].stop, prompt.stop + margin)


def positions(axes: "Axes", found: list[Segment], target: int, original: int | None, shown: tuple[int, int]) -> None:
    """Position ids of a row's segments between two places: contiguous runs as lines, jumps dotted."""
    complete, near = shown[0] == 0 and shown[1] == found[-1].stop, shown[1] - shown[0] <= 200
    several = len(samples_in(found)) > 1
    answers = any(segment.kind == ANSWER for segment in found)
    # A line that leaves the model's own window early would run through its name.
    climbs = bool(original) and found[0].positions[0][1] > 2 * original
    _windows(axes, target, original, named=complete, climbs=climbs)
    before: tuple[int, int, int] | None = None  # place, position and sample of the token before
    for segment in found:
        if segment.kind == PADDING:
            options = {"facecolor": _PADDING, "edgecolor": PAPER.grid, "hatch": "//", "linewidth": 0}
            axes.axvspan(segment.start, segment.stop, **options)
            continue
        colour = PAPER.control if segment.kind == PROMPT else _SAMPLES[segment.sample % len(_SAMPLES)]
        at = segment.start
        for first, last in segment.positions:
            if before and before[2] == segment.sample:
                line = ([before[0] + 0.5, at + 0.5], [before[1], first])
                axes.plot(*line, color=PAPER.muted, linewidth=0.8, linestyle=(0, (1, 2)))
            places, ids = np.arange(at, at + last - first + 1), np.arange(first, last + 1)
            if near:
                axes.plot(places + 0.5, ids, ".", color=colour, markersize=5, clip_on=True)
            else:
                width = 1.0 if answers and segment.kind == CONTEXT else 2.2  # what is not supervised is thin
                axes.plot([at, at + len(ids)], [first, last], color=colour, linewidth=width, solid_capstyle="butt")
                if len(ids) < found[-1].stop / 100 and not answers:  # it would be a speck
                    axes.plot(
                        at + len(ids) / 2, (first + last) / 2, "o", color=colour, ms=3 if several else 5, clip_on=False
                    )
            before = (at + len(ids) - 1, last, segment.sample)
            at += len(ids)
        if complete and not several and not answers:
            _name(axes, segment, found[-1].stop, target)
    axes.set_xlim(*shown)
    axes.set_ylim(-0.03 * target, 1.1 * target)
    _dress(axes, shown, labels=False)
    axes.set_yticks(np.linspace(0, target, 5 if target % 4 == 0 else 2))
    axes.set_yticklabels([short(tick) if complete else "" for tick in axes.get_yticks()])
    axes.grid(axis="y", color=PAPER.grid, linewidth=0.6)


def _windows(axes: "Axes", target: int, original: int | None, named: bool, climbs: bool) -> None:
    """The model's own window as a band, the end of the target window as a line."""
    options = {
        "xycoords": ("axes fraction", "data"),
        "textcoords": "offset points",
        "color": PAPER.muted,
        "fontsize": 8,
    }
    if original and original < target:
        axes.axhspan(0, original, color="#eef3f9", linewidth=0)
        if named:
            place, shift, side = ((1, original), (-3, 3), "right") if climbs else ((0, original), (3, 3), "left")
            axes.annotate(f"the model's own window, {original:,}", place, xytext=shift, ha=side, **options)
    axes.axhline(target - 1, color=PAPER.muted, linewidth=0.8, linestyle=(0, (4, 3)))
    if named:
        axes.annotate(f"end of the target window, L - 1 = {target - 1:,}", (0, target - 1), xytext=(3, 4), **options)


def _name(axes: "Axes", segment: Segment, length: int, target: int) -> None:
    """Says what a segment of a row with one sample is, beside it."""
    first, last = segment.positions[0][0], segment.positions[-1][1]
    reach = f"positions {first:,} to {last:,}" if last > first else f"position {first:,}"
    words = f"{len(segment):,} token{'s' * (len(segment) > 1)}, {reach}"
    options = {"textcoords": "offset points", "va": "center"}
    if segment.kind == PROMPT:
        high = (first + last) / 2 > 0.3 * target
        axes.annotate(
            f"terminal prompt\n{words}",
            ((segment.start + segment.stop) / 2, (first + last) / 2),
            xytext=(-28, -30 if high else 40),
            ha="right",
            color=PAPER.control,
            arrowprops={"arrowstyle": "-", "color": PAPER.control, "linewidth": 0.8, "shrinkB": 4},
            **options,
        )
        return
    chunks = f", {len(segment.positions)} chunks" if len(segment.positions) > 1 else ""
    # Beside the middle of the longest line that the ids make: to the right of one that climbs fast, else above it.
    runs = np.array(segment.positions)
    sizes = runs[:, 1] - runs[:, 0] + 1
    longest = int(sizes.argmax())
    middle = 0.6 * sizes[longest]
    place = (segment.start + sizes[:longest].sum() + middle, runs[longest, 0] + middle)
    steep = sizes[longest] > 0.4 * target
    where = {"xytext": (16, -22), "ha": "left"} if steep else {"xytext": (0, 30), "ha": "center"}
    axes.annotate(f"context{chunks}\n{words}", place, color=PAPER.extended, **where, **options)


def documents(axes: "Axes", excerpts: list[dict[str, int]], shown: tuple[int, int], named: bool) -> None:
    """A strip of the documents of a row in two greys, with a mark where one ends and the next begins."""
    low, high = shown
    for number, each in enumerate(excerpts):
        start, stop = max(each["start"], low), min(each["stop"], high)
        if start >= stop:
            continue
        axes.axvspan(start, stop, color=("#c9d1db", "#e3e8ee")[number % 2], linewidth=0)
        words = f"#{each['document']:,}"
        if stop - start > (high - low) * 0.02 * len(words):
            axes.text((start + stop) / 2, 0.48, words, ha="center", va="center", color=PAPER.ink)
        if each["start"] > low:
            axes.axvline(each["start"], color=PAPER.ink, linewidth=0.9)
    count = len({each["document"] for each in excerpts})
    _strip(axes, shown, f"{count} document{'s' * (count != 1)}" if named else "", labels=False)


def loss_weights(axes: "Axes", row: dict[str, Any], shown: tuple[int, int], named: bool) -> None:
    """A strip of the loss weights: the darker the heavier, with the number where it fits; 0 is white."""
    low, high = shown
    runs = weight_runs(row)
    heaviest = max((weight for *_, weight in runs), default=1.0) or 1.0
    for start, stop, weight in runs:
        start, stop = max(start, low), min(stop, high)
        if start >= stop:
            continue
        axes.axvspan(
            start, stop, color=PAPER.extended, alpha=0.12 + 0.5 * weight / heaviest if weight else 0, linewidth=0
        )
        words = f"{weight:g}"
        if stop - start > (high - low) * (0.01 if named else 0.055) * len(words):
            axes.text((start + stop) / 2, 0.48, words, ha="center", va="center", color=PAPER.ink)
    values = sorted({weight for *_, weight in runs}, reverse=True)
    listed = f" ({', '.join(f'{value:g}' for value in values)})" if len(values) <= 4 else ""
    _strip(axes, shown, f"loss weight{listed}" if named else "", labels=True)


def _strip(axes: "Axes", shown: tuple[int, int], name: str, labels: bool) -> None:
    axes.set_xlim(*shown)
    axes.set_ylim(0, 1)
    axes.set_yticks([0.5], [name])
    _dress(axes, shown, labels)


def _dress(axes: "Axes", shown: tuple[int, int], labels: bool) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(2 if shown[0] else 8, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{int(value):,}"))
    bare(axes, PAPER)
    axes.tick_params(labelbottom=labels)
