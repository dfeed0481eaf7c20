"""matplotlib's pictures as inline SVG whose colours are CSS variables, so that they follow light and dark mode."""

import io
import re
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NORMAL = (4.6, 2.9)  # inches of a picture in a column; words in it are about 8.5 points
WIDE = (7.2, 3.0)  # across the page
RUNS = tuple(f"run{number}" for number in range(2, 7))
# matplotlib wants real colours; these are unlikely ones, each replaced by a variable of the page's style sheet.
STAND_INS = {
    name: f"#0102{index:02x}"
    for index, name in enumerate(("ink", "muted", "grid", "baseline", "extended", "control", "untrained", *RUNS))
}


def svg(draw: Callable[["Axes"], None], title: str, number: int, size: tuple[float, float]) -> str:
    """An <svg> element that scales with its column.  `number` keeps its ids apart from other pictures'."""
    import matplotlib
    from matplotlib.figure import Figure

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
    for name, colour in STAND_INS.items():
        text = text.replace(colour, f"var(--{name})")
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
