"""The report's building blocks: numbered figures, groups of them, and the note of a section that is empty."""

from collections.abc import Callable
from html import escape


class Figures:
    """Numbers the pictures, so that their ids stay apart on one page."""

    def __init__(self) -> None:
        self.count = 0

    def figure(self, draw: Callable, title: str, caption: str = "", size: tuple[float, float] = (5.2, 3.1)) -> str:
        """A <figure> of what `draw(axes)` draws."""
        from endprompt_megatron.report.plots import svg

        self.count += 1
        below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
        return f"<figure>{svg(draw, escape(title), self.count, size)}{below}</figure>"


def group(figures: list[str], small: bool = False) -> str:
    """Figures side by side where there is room."""
    return f'<div class="figures{" small" if small else ""}">{"".join(figures)}</div>'


def missing(text: str) -> str:
    """Says that a section has nothing to show, and how to get it.  `text` is HTML."""
    return f'<p class="missing">{text}</p>'
