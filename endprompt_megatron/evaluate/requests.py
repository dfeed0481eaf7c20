"""What a suite asks, one thing at a time: an input, how it is put to an engine, and what is kept of the answer.

A suite makes its items lazily and in a fixed order; store.py keeps the records, and the suite makes its result of the
(entry, record) pairs again, whichever process answered them and when.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from endprompt_megatron.evaluate.engines.base import Engine, Prompt


@dataclass(frozen=True)
class Entry:
    """An item's name, and what its suite needs besides the answer; JSON."""

    suite: str
    task: str
    length: int
    number: int
    notes: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Item:
    """One input.  `content` is all of it: the answer is another one's as soon as these bytes are."""

    entry: Entry
    content: bytes
    tokens: int  # that an engine reads, for the progress bar
    ask: Callable[["Engine"], dict] | None = None  # gives the record, JSON; otherwise:
    prompt: "Prompt | None" = None
    read: Callable[[list[int]], dict] | None = None  # the record from what was generated
    alone: bool = False  # asked of no engine, once there is none in memory

    def digest(self, model: str) -> str:
        """Key of the answer of the model with that fingerprint."""
        e, digest = self.entry, hashlib.sha256()
        digest.update(repr((model, e.suite, e.task, e.length, e.number)).encode())
        digest.update(self.content)
        return digest.hexdigest()[:32]


Answered = tuple[Entry, dict]


def content_of(*parts: object) -> bytes:
    """Bytes that tell inputs apart: arrays by their values, the rest by its repr."""
    return b"\0".join(
        part.astype(np.int64).tobytes() if isinstance(part, np.ndarray) else repr(part).encode() for part in parts
    )


def answers(engine: "Engine", items: Iterable[Item]) -> Iterator[tuple[Item, dict]]:
    """Every item with its record, as they are answered.  An engine that takes many prompts at once gets them so."""
    for generates, group in itertools.groupby(items, key=lambda item: item.prompt is not None):
        if generates:
            yield from _generated(engine, group)
        else:
            for item in group:
                yield item, item.ask(engine)


def _generated(engine: "Engine", items: Iterable[Item]) -> Iterator[tuple[Item, dict]]:
    from endprompt_megatron.evaluate.engines.base import generate_all

    under_way: dict[int, Item] = {}

    def prompts() -> Iterator["Prompt"]:
        for item in items:
            under_way[id(item.prompt)] = item
            yield item.prompt

    for prompt, generated in generate_all(engine, prompts()):
        item = under_way.pop(id(prompt))
        yield item, item.read(generated)


def answered(engine: "Engine", items: Iterable[Item], tick: Callable[[str], None] = lambda _: None) -> list[Answered]:
    """All items' entries and records, in the order of the items, with nothing stored."""
    items = list(items)
    records = {}
    for item, record in answers(engine, items):
        tick(f"{item.entry.suite} {item.entry.length}")
        records[id(item)] = record
    return [(item.entry, records[id(item)]) for item in items]
