"""Tables of the docs that are made from the code: each stands between two marks of its page, a test compares them.

`python -m MODULE PAGE` writes a module's table into a page anew; the first mark names the command.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

from endprompt_megatron.common.errors import InputError, run_cli


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown; a | in a cell is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def with_table(page: str, module: str, table: str) -> str:
    """The page's text with the module's table between its marks.  Raises ValueError for a page without them."""
    begin, end = f"<!-- made by: python -m {module} ", f"<!-- end: {module} -->"
    pattern = re.compile(rf"({re.escape(begin)}[^\n]*-->\n).*?({re.escape(end)})", re.DOTALL)
    if len(pattern.findall(page)) != 1:
        raise ValueError(f"the page should have the marks '{begin}PAGE -->' and '{end}' once each")
    return pattern.sub(lambda marks: f"{marks[1]}\n{table}\n\n{marks[2]}", page)


def main(module: str, table: Callable[[], str]) -> None:
    """The command line of a module that makes a table: write it into the page that is given."""

    def write() -> None:
        if len(sys.argv) != 2:
            raise InputError(f"usage: python -m {module} PAGE.md")
        page = Path(sys.argv[1])
        try:
            page.write_text(with_table(page.read_text(encoding="utf-8"), module, table()), encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InputError(f"{page}: {error}") from None

    run_cli(write)
