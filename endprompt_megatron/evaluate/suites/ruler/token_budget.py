"""How much haystack fits: NVIDIA's search and retries, with every random draw in the same order.

A generator draws a prompt with so many units of haystack (words, sentences, documents).  Each draw moves the random
stream on, so whether a prompt fits decides what all later ones hold: the search has to ask for the same sizes.
"""

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from endprompt_megatron.common.errors import InputError

TRIES = 50  # at the smallest size; NVIDIA's scripts would try for ever

Draw = Callable[[int], tuple[str, list[str]]]  # units of haystack -> prompt, references


@dataclass(frozen=True)
class FittedPrompt:
    """A prompt that fits: its text, the same as token ids (no BOS), and the answers.

    `long_list`: english_words.json had a part in it (cwe).
    """

    text: str
    ids: list[int]
    references: list[str]
    long_list: bool = False


class Unlucky(Exception):
    """A draw that NVIDIA's script throws away as well; the next one follows it in the random stream."""


@dataclass(frozen=True)
class TokenBudget:
    """`length` tokens, `new_tokens` of which are the answer's."""

    task: str
    length: int
    new_tokens: int
    encode: Callable[[str], list[int]]

    def search(self, draw: Draw, low: int, high: int, beside: int = 0) -> int:
        """The most units from `low` to `high` whose prompt fits with `beside` further tokens; `low` if none does."""
        best = low
        while low <= high:
            middle = (low + high) // 2
            if len(self.encode(_lucky(draw, middle)[0])) + beside + self.new_tokens <= self.length:
                best, low = middle, middle + 1
            else:
                high = middle - 1
        return best

    def search_from_estimate(self, draw: Draw, low: int, beside: int = 0) -> int:
        """`search` up to three times of what a prompt of `low` units lets expect."""
        tokens = len(self.encode(_lucky(draw, low)[0])) / low
        return self.search(draw, low, max(int(self.length / tokens * 3), 2 * low), beside)

    def fit(self, draw: Draw, units: int, step: int) -> FittedPrompt:
        """A prompt of `units`, or by `step` fewer for each one that does not fit.  Raises InputError if none does."""
        for _ in range(TRIES + max(units // step, 0)):
            try:
                text, references = draw(units)
            except (Unlucky, ValueError):  # ValueError: random.sample wants more than there is
                pass
            else:
                ids = self.encode(text)
                if len(ids) + self.new_tokens <= self.length:
                    return FittedPrompt(text, ids, references)
            if units > step:
                units -= step
        raise self.too_short()

    def too_short(self) -> InputError:
        """The error for a length that no prompt fits in."""
        return InputError(f"--lengths {self.length}: RULER's {self.task} does not fit in it; use a longer one")


def _lucky(draw: Draw, units: int) -> tuple[str, list[str]]:
    while True:
        try:
            return draw(units)
        except Unlucky:
            continue


def shuffled(items: Sequence, seed: int) -> list:
    """`items` as random.Random(seed).shuffle would leave them."""
    return [items[place] for place in _order(seed, len(items))]


@functools.lru_cache(maxsize=8)
def _order(seed: int, count: int) -> list[int]:
    """A shuffle depends on nothing but seed and number: most samples of a task share one."""
    places = list(range(count))
    random.Random(seed).shuffle(places)
    return places
