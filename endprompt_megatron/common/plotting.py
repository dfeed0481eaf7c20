"""Colours and axes that several rooms' pictures share: evaluation plots, the report, the study, samples of the data.

A palette names what a colour is for.  PAPER is for files that stand alone; PAGE is for SVG inside an HTML page,
where `svg` replaces each colour with a variable of the page's style sheet, so that pictures follow the reader's
light or dark mode.  matplotlib is imported only to draw.
"""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours of a page by purpose.  A run after the first of a page has a colour of its own: run2, run3, ...
LIGHT = {
    "paper": "#ffffff",
    "ink": "#1d2127",
    "muted": "#5d6674",
    "grid": "#e1e4e9",
    "wash": "#f4f5f7",
    "baseline": "#6f7886",
    "extended": "#1765b0",
    "control": "#a8590f",
    "untrained": "#7d58a6",
    "run2": "#b0302f",
    "run3": "#1f7a4d",
    "run4": "#8a6a00",
    "run5": "#b03a86",
    "run6": "#0f7684",
    "better": "#1f7a4d",
    "worse": "#b0302f",
    "heat": "#4f93d2",  # of a cell at 100%, under ink
}
DARK = {
    "paper": "#14171c",
    "ink": "#e6e9ee",
    "muted": "#9aa4b2",
    "grid": "#2c323b",
    "wash": "#1b2027",
    "baseline": "#98a2b1",
    "extended": "#6cb0f5",
    "control": "#e39a52",
    "untrained": "#bb9ae0",
    "run2": "#f08a85",
    "run3": "#6cc796",
    "run4": "#d8b548",
    "run5": "#ec8bc6",
    "run6": "#5cc3d1",
    "better": "#6cc796",
    "worse": "#f08a85",
    "heat": "#2a67a5",
}
RUNS = tuple(name for name in LIGHT if name.startswith("run"))
MAX_RUNS = 1 + len(RUNS)  # runs whose colours, markers and dashes a reader can tell apart

# Lines are told apart without colour too: on a black-and-white print, and by readers who do not see colours.
MARKERS = {"baseline": "s", "extended": "o", "control": "^", "untrained": "D"} | dict(zip(RUNS, "vPX*h", strict=True))
DASHES = {"baseline": (0, (4, 2)), "extended": "-", "control": (0, (1, 1.2)), "untrained": "-."} | dict(
    zip(RUNS, [(0, (6, 1.5)), (0, (3, 1, 1, 1)), (0, (2, 1)), (0, (8, 2, 1, 2)), (0, (5, 3))], strict=True)
)
LABELS = {"untrained": "interpolated, untrained"}

# For many lines that have no purpose of their own: ten colours that show on light and dark, then other dashes.
CYCLE = (
    *("#1765b0", "#c2571a", "#2e8b57", "#8f4fb3", "#b8860b", "#d6336c", "#2a9d9d", "#7a7a7a", "#6b8e23", "#a0522d"),
)
CYCLE_DASHES = ("-", (0, (6, 3)), (0, (2, 3)))


@dataclass(frozen=True)
class Palette:
    """Colours by purpose, and the names of lines in legends by their keys."""

    ink: str = LIGHT["ink"]
    muted: str = LIGHT["muted"]
    grid: str = LIGHT["grid"]
    baseline: str = LIGHT["baseline"]
    extended: str = LIGHT["extended"]
    control: str = LIGHT["control"]
    untrained: str = LIGHT["untrained"]
    runs: tuple[str, ...] = tuple(LIGHT[name] for name in RUNS)
    names: dict[str, str] = field(default_factory=lambda: LABELS)

    def of(self, label: str) -> str:
        """The colour of a model or run."""
        if label in RUNS:
            return self.runs[RUNS.index(label)]
        return getattr(self, label, self.baseline if label.startswith("baseline") else self.ink)

    def line(self, label: str) -> dict:
        """How a model's line is drawn, and its name in the legend."""
        return {
            "label": self.names.get(label, label),
            "color": self.of(label),
            "marker": MARKERS.get(label, "s"),
            "linestyle": DASHES.get(label, ":"),
            "markersize": 4,
            "linewidth": 1.7,
        }


PAPER = Palette()

# matplotlib wants real colours: PAGE has unlikely ones, which `svg` replaces with the page's variables.
_PURPOSES = ("ink", "muted", "grid", "baseline", "extended", "control", "untrained")
_STAND_INS = {name: f"#0102{index:02x}" for index, name in enumerate((*_PURPOSES, *RUNS))}


def page_palette(names: dict[str, str]) -> Palette:
    """Colours of a page, and the names of its lines in legends by their keys."""
    # A leading underscore would hide a line from matplotlib's legend, a dollar sign would begin mathematics.
    names = {key: name.lstrip("_").replace("$", "\\$") or key for key, name in names.items()}
    colours = {name: _STAND_INS[name] for name in _PURPOSES}
    return Palette(**colours, runs=tuple(_STAND_INS[name] for name in RUNS), names=names)


PAGE = page_palette({})


def svg(draw: Callable[["Axes"], None], title: str, number: int, size: tuple[float, float]) -> str:
    """An <svg> element that scales with its column.  `number` keeps its ids apart from other pictures'."""
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot: no global state, no window system

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": str(number)}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    head, rest = text.split(">", 1)
    head = re.sub(r'\s(?:xmlns(?::\w+)?|version|width|height)="[^"]*"', "", head)
    text = f"{head}>{rest}"
    text = text.replace("xlink:href", "href")
    text = re.sub(r'\bid="([^"]+)"', rf'id="f{number}-\1"', text)
    text = re.sub(r"url\(#", f"url(#f{number}-", text)
    text = re.sub(r'href="#', f'href="#f{number}-', text)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r"font: (\w+) ([\d.]+)px [^;\"]*", r"font-weight: \1; font-size: \2px", text)
    for name, colour in _STAND_INS.items():
        text = text.replace(colour, f"var(--{name})")
    return text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)


def short(tokens: float) -> str:
    """8192 as 8K, 12000 as 12,000, 500 as 500."""
    tokens = int(tokens)
    return f"{tokens // 1024}K" if tokens >= 1024 and tokens % 1024 == 0 else f"{tokens:,}"


def dress(axes: "Axes", palette: Palette, title: str, x: str, y: str) -> None:
    """Quiet axes: no box, faint horizontal grid, title to the left in place of a y label."""
    bare(axes, palette)
    axes.tick_params(labelsize=8.5)
    axes.tick_params(axis="x", length=3)
    axes.grid(axis="y", color=palette.grid, linewidth=0.8)
    axes.set_title(title, loc="left", color=palette.ink, fontsize=10, pad=20, fontweight="bold")
    axes.text(0, 1.03, y, transform=axes.transAxes, color=palette.muted, fontsize=8.5)
    axes.set_xlabel(x, color=palette.muted, fontsize=8.5)


def bare(axes: "Axes", palette: Palette) -> None:
    """Axes without a box or tick marks, under what is drawn."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(palette.muted)
    axes.tick_params(colors=palette.muted, length=0)
    axes.set_axisbelow(True)


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
