"""Curves of a study: one line per variant over distances, lengths or positions, drawn by matplotlib."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from endprompt_megatron.common.html_page import Figure
from endprompt_megatron.common.plotting import CYCLE, CYCLE_DASHES, PAGE, dress, length_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = list[tuple[float, float]]
_LINES_BESIDE = 14  # of a legend, beside a picture of usual height


def number_axis(axes: "Axes", places: list[float]) -> None:
    """Numbers such as learning rates on a logarithmic x axis."""
    from matplotlib.ticker import NullLocator

    axes.set_xscale("log")
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.xaxis.set_minor_locator(NullLocator())


def curves(
    title: str,
    x_name: str,
    y_name: str,
    lines: dict[str, Points],
    order: list[str],
    axis: Callable[["Axes", list], None] = length_axis,
) -> Figure | None:
    """Points (x, y) of each variant over a logarithmic x axis; None where all have the same x.

    `order` names all variants of the page, in the order of their colours; `axis` draws the x axis.
    """
    places = sorted({x for points in lines.values() for x, _ in points})
    if len(places) < 2:
        return None

    def draw(axes: "Axes") -> None:
        for name, points in lines.items():
            number = order.index(name)
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                # After the last colour the first comes again, with other dashes.
                color=CYCLE[number % len(CYCLE)],
                linestyle=CYCLE_DASHES[number // len(CYCLE) % len(CYCLE_DASHES)],
                linewidth=1.5,
                # A leading underscore would hide a line from the legend, a dollar sign would begin mathematics.
                label=name.lstrip("_").replace("$", "\\$") or str(number),
            )
        axis(axes, places)
        dress(axes, PAGE, title, x_name, y_name)
        options = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.08), "borderaxespad": 0, "labelspacing": 0.35}
        axes.legend(frameon=False, fontsize=8, labelcolor=PAGE.ink, **options)

    height = 3.2 + 0.17 * max(0, len(lines) - _LINES_BESIDE)
    return Figure(draw, title, size=(8.2, height))
