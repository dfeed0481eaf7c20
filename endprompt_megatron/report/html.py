"""The report's building blocks: sections, tables, numbered figures, and the note of a section that is empty.

Functions take and give HTML unless they say text: what comes from a file is escaped where it enters a sentence.
"""

from collections.abc import Callable, Iterable, Sequence
from html import escape

SIZE = (4.6, 2.9)  # inches of a picture in a column; words in it are about 8.5 points
WIDE = (7.2, 3.0)  # across the page


class Figures:
    """Numbers the pictures, so that their ids stay apart on one page."""

    def __init__(self) -> None:
        self.count = 0

    def figure(self, draw: Callable, title: str, caption: str = "", size: tuple[float, float] = SIZE) -> str:
        """A <figure> of what `draw(axes)` draws.  `title` and `caption` are text."""
        from endprompt_megatron.report.figures import svg

        self.count += 1
        below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
        drawn = svg(draw, escape(title), self.count, size)
        if size[0] > SIZE[0]:  # on a phone it keeps a width at which its words can be read
            drawn = f'<div class="scroll wide" tabindex="0">{drawn}</div>'
        return f"<figure>{drawn}{below}</figure>"


def group(figures: list[str], small: bool = False) -> str:
    """Figures side by side where there is room."""
    return f'<div class="figures{" small" if small else ""}">{"".join(figures)}</div>'


def section(key: str, title: str, *parts: str) -> str:
    """A part of the page with a heading; `key` is its id, `title` text."""
    return f'<section id="{key}"><h2>{escape(title)}</h2>{"".join(parts)}</section>'


def missing(text: str) -> str:
    """Says that a section has nothing to show, and how to get it."""
    return f'<p class="missing">{text}</p>'


def note(sentences: Iterable[str]) -> str:
    """Small print below a table; nothing where there is nothing to say."""
    text = " ".join(sentences)
    return f'<p class="note">{text}</p>' if text else ""


def details(summary: str, *parts: str, printed: bool = True) -> str:
    """Folded until it is clicked; in print it is open where `printed`."""
    kind = "" if printed else ' class="apart"'
    return f"<details{kind}><summary>{summary}</summary>{''.join(parts)}</details>"


def table(
    head: Sequence[str],
    rows: Iterable[tuple[str, Sequence[str]]],
    *,
    caption: str = "",
    columns: Sequence[str] | None = None,
    kind: str = "",
) -> str:
    """A table that scrolls in a box of its own.  `head` names the columns after the first, rows begin with their name.

    `columns`: CSS classes of the columns after the first.
    """
    classes = list(columns or [""] * len(head))
    top = "".join(f'<th scope="col"{_class(name)}>{title}</th>' for title, name in zip(head, classes, strict=True))
    body = ""
    for name, cells in rows:
        line = "".join(f"<td{_class(of)}>{cell}</td>" for cell, of in zip(cells, classes, strict=True))
        body += f'<tr><th scope="row">{name}</th>{line}</tr>'
    # Not a <caption>: that would be as wide as the table, and cut off with it where the table scrolls.
    above = f'<p class="caption">{caption}</p>' if caption else ""
    return (
        f'{above}<div class="scroll" tabindex="0"><table{_class(kind)}><thead><tr><th></th>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _class(name: str) -> str:
    return f' class="{escape(name)}"' if name else ""


def sentence(words: Sequence[str], last: str = "and") -> str:
    """a, b and c."""
    return " ".join(filter(None, [", ".join(words[:-1]), last if len(words) > 1 else "", *words[-1:]]))
