"""What a source can hold instead of a document, and how it is counted."""

from dataclasses import dataclass, field
from typing import NamedTuple

MAX_PLACES = 5  # of each kind that are named


class Reject(NamedTuple):
    """In place of a text: `kind` is one of the words that the manifest counts by, `message` says what is wrong.

    One that is not `skippable` ends the run even with --skip-bad: more than this document is wrong.
    """

    kind: str
    message: str
    skippable: bool = True


@dataclass
class Skipped:
    """Rejects of a chunk by kind: how many, and (number, message) of the first."""

    kinds: dict[str, tuple[int, list[tuple[int, str]]]] = field(default_factory=dict)

    def add(self, number: int, reject: Reject) -> None:
        """Count a reject that stands in place of document `number`."""
        count, first = self.kinds.get(reject.kind, (0, []))
        self.kinds[reject.kind] = count + 1, first if len(first) == MAX_PLACES else [*first, (number, reject.message)]
