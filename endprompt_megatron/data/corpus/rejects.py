"""What a source can hold that is no document, and how it is counted."""

from dataclasses import dataclass, field
from typing import NamedTuple

FIRST = 5  # places of each kind that are named


class Bad(NamedTuple):
    """In place of a text: `kind` is one of the words that the manifest counts by, `message` says what is wrong.

    What is not `skippable` ends the run whatever was asked for: it is wrong with more than this document.
    """

    kind: str
    message: str
    skippable: bool = True


@dataclass
class Skipped:
    """Bad documents of a piece by kind: how many, and (number, message) of the first."""

    kinds: dict[str, tuple[int, list[tuple[int, str]]]] = field(default_factory=dict)

    def add(self, number: int, bad: Bad) -> None:
        count, first = self.kinds.get(bad.kind, (0, []))
        self.kinds[bad.kind] = count + 1, first if len(first) == FIRST else [*first, (number, bad.message)]
