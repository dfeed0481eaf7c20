"""What the suites' pictures have in common: which models an evaluation has of a suite, and where the base window ends.

Every picture draws into the axes it is given, in the colours of the palette it is given: a report draws the same ones.
"""

from typing import TYPE_CHECKING

from endprompt_megatron.common.plotting import Palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def of_suite(results: dict, suite: str) -> list[tuple[str, dict]]:
    """(label, measurement) of every model that the suite was run on."""
    return [(label, measured[suite]) for label, measured in results["measurements"].items() if suite in measured]


def window_mark(axes: "Axes", results: dict, palette: Palette) -> None:
    """A dotted line where the baseline's own window ends."""
    window = results["models"].get("baseline", {}).get("window")
    low, high = axes.get_xlim()
    if window and low < window < high:
        axes.axvline(window, color=palette.muted, linewidth=0.9, linestyle=(0, (1, 2)))
        options = {"ha": "center", "va": "bottom", "fontsize": 7.5, "color": palette.muted}
        axes.annotate("base window", (window, 1.0), xycoords=("data", "axes fraction"), **options)
