"""Self-contained HTML pages: what a page holds as plain data, and the templates that turn it into HTML.

report/ and study/ build a `Page` of sections and blocks; `render` fills templates/page.html.j2.  Each block names the
macro of templates/blocks.html.j2 that writes it.  Texts are plain and always escaped.  In prose (paragraphs, captions,
summaries, lists) words between `backticks` become code and words between **double asterisks** strong.  The page fetches
nothing: its style and its pictures are inside, and its Content-Security-Policy forbids the rest.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from endprompt_megatron.common.plotting import DARK, LIGHT, svg

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes

NORMAL = (4.6, 2.9)  # inches of a picture in a column; words in it are about 8.5 points
WIDE = (7.2, 3.0)  # across the page


@dataclass(frozen=True)
class Cell:
    """A table's cell: a text, the sign of a comparison, and a second line in small print."""

    text: str
    sign: str = ""  # "better", "worse" or "same"
    small: str = ""
    title: str = ""  # shown while the pointer is over the text
    strong: bool = False
    code: bool = False


@dataclass(frozen=True)
class Row:
    """A table's row.  `kind`: a CSS class of its name."""

    name: str | Cell
    cells: Sequence[str | Cell]
    kind: str = ""


@dataclass(frozen=True)
class Paragraph:
    """A paragraph; `kind` is a CSS class, such as "note" for small print or "missing" for what a section lacks."""

    macro: ClassVar[str] = "paragraph"
    text: str
    kind: str = ""


def missing(text: str) -> Paragraph:
    """Says that a section has nothing to show, and how to get it."""
    return Paragraph(text, "missing")


def note(sentences: Iterable[str]) -> list[Paragraph]:
    """Small print in a list of one; an empty list where there is nothing to say."""
    text = " ".join(filter(None, sentences))
    return [Paragraph(text, "note")] if text else []


@dataclass(frozen=True)
class Heading:
    """A heading within a section."""

    macro: ClassVar[str] = "heading"
    text: str


@dataclass(frozen=True)
class Table:
    """A table that scrolls in a box of its own.

    `head` names the columns after the first, `columns` gives their CSS classes; `first` heads the column of names.
    """

    macro: ClassVar[str] = "table"
    head: Sequence[str | Cell]
    rows: Sequence[Row]
    caption: str = ""
    columns: Sequence[str] = ()
    kind: str = ""
    first: str = ""

    @property
    def classes(self) -> list[str]:
        return list(self.columns or [""] * len(self.head))


@dataclass(frozen=True)
class HeatMap:
    """A small table whose cells are shaded by their level, 0 to 1; `cells` hold (level, cell) or None for no value."""

    macro: ClassVar[str] = "heat_map"
    title: str
    first: str
    head: Sequence[str]
    rows: Sequence[tuple[str, Sequence[tuple[float, Cell] | None]]]


@dataclass(frozen=True)
class HeatMaps:
    """Heat maps side by side, with their common scale below."""

    macro: ClassVar[str] = "heat_maps"
    maps: Sequence[HeatMap]
    scale_name: str


@dataclass(frozen=True)
class Figure:
    """A picture that `draw(axes)` draws, in inches; one wider than NORMAL keeps a readable width on a phone."""

    macro: ClassVar[str] = "figure"
    draw: Callable[["Axes"], None]
    title: str
    caption: str = ""
    size: tuple[float, float] = NORMAL

    @property
    def is_wide(self) -> bool:
        return self.size[0] > NORMAL[0]


@dataclass(frozen=True)
class Group:
    """Figures side by side where there is room."""

    macro: ClassVar[str] = "group"
    figures: Sequence[Figure]
    small: bool = False


@dataclass(frozen=True)
class Details:
    """Folded until it is clicked; open in print where `printed`."""

    macro: ClassVar[str] = "details"
    summary: str
    blocks: Sequence["Block"]
    printed: bool = True


@dataclass(frozen=True)
class Code:
    """Text as it is in a file."""

    macro: ClassVar[str] = "code"
    text: str


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    macro: ClassVar[str] = "bullets"
    items: Sequence[str]


Block = Paragraph | Heading | Table | HeatMaps | Figure | Group | Details | Code | Bullets


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading; `key` is its id, to which the list of contents links."""

    key: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A page.  `kind` stands above its heading, `facts` (name, value) below its introduction."""

    title: str
    heading: str
    sections: Sequence[Section]
    kind: str = ""
    introduction: Sequence[Block] = ()
    facts: Sequence[tuple[str, str]] = field(default_factory=list)
    footer: str = ""
    body: str = ""  # CSS class of the whole page


def render(page: Page) -> str:
    """The page as HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    numbers = itertools.count(1)  # keep the ids of one picture apart from those of the others
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )

    def picture(figure: Figure) -> "Markup":
        from markupsafe import Markup, escape

        return Markup(svg(figure.draw, escape(figure.title), next(numbers), figure.size))

    def show(block: Block) -> "Markup":
        return getattr(environment.get_template("blocks.html.j2").module, block.macro)(block)

    environment.filters |= {"prose": prose, "picture": picture, "show": show}
    environment.tests["cell"] = lambda value: isinstance(value, Cell)
    return environment.get_template("page.html.j2").render(page=page, light=LIGHT, dark=DARK)


def prose(text: str) -> "Markup":
    """Escaped text in which `words` become code and **words** strong."""
    from markupsafe import Markup, escape

    html = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text)))
    return Markup(re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", html))


def enumerate_words(words: Sequence[str], last: str = "and") -> str:
    """a, b and c."""
    return " ".join(filter(None, [", ".join(words[:-1]), last if len(words) > 1 else "", *words[-1:]]))
