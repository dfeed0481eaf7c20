"""The words: wonderwords' lists, all pairs of an adjective and a noun, and the long list that cwe may need."""

import bisect
import functools
import importlib.resources
import itertools
from collections.abc import Sequence

from endprompt_megatron.common.errors import InputError


@functools.cache
def wonderwords(name: str) -> list[str]:
    """The list `name` (noun, adjective, verb) of the package wonderwords.  Raises InputError if it is not installed."""
    try:
        file = importlib.resources.files("wonderwords.assets") / f"{name}list.txt"
        return [line.rstrip() for line in file.read_text(encoding="utf-8").splitlines()]
    except ModuleNotFoundError:
        raise InputError("--suite ruler: needs the package wonderwords; pip install -r requirements.txt") from None


class Pairs(Sequence[str]):
    """All different "adjective-noun", in the order of the texts: sorted({f"{a}-{n}" for a in .. for n in ..}).

    There are six million of them, so they are numbered and not made.  Adjectives of which none begins another take a
    block of nouns each; where one does ("blue-" and "blue-eyed-" would), theirs are mixed, made and sorted together.
    """

    def __init__(self, adjectives: list[str], nouns: list[str]) -> None:
        self._nouns = sorted(set(nouns))
        self._blocks: list[tuple[str, list[str] | None]] = []
        beginnings = sorted({f"{adjective}-" for adjective in adjectives})
        while beginnings:
            group = list(itertools.takewhile(lambda text: text.startswith(beginnings[0]), beginnings))
            made = sorted({text + noun for text in group for noun in self._nouns}) if len(group) > 1 else None
            self._blocks.append((group[0], made))
            del beginnings[: len(group)]
        sizes = (len(self._nouns if made is None else made) for _, made in self._blocks)
        self._starts = [0, *itertools.accumulate(sizes)]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, place: int) -> str:
        if not 0 <= place < len(self):
            raise IndexError(place)
        block = bisect.bisect_right(self._starts, place) - 1
        beginning, made = self._blocks[block]
        within = place - self._starts[block]
        return beginning + self._nouns[within] if made is None else made[within]


@functools.cache
def pairs() -> Pairs:
    """The keys of needles."""
    return Pairs(wonderwords("adjective"), wonderwords("noun"))


@functools.cache
def single_words() -> list[str]:
    """Nouns, adjectives and verbs, each once, sorted."""
    return sorted({*wonderwords("noun"), *wonderwords("adjective"), *wonderwords("verb")})
