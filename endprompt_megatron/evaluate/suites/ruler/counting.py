"""Counting: the ten words of a list that stand in it most often (cwe), the three of a coded text (fwe)."""

import bisect
import dataclasses
import random
import string
from collections.abc import Callable, Iterator

import numpy as np

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.evaluate.suites.ruler.ruler_tasks import Task
from endprompt_megatron.evaluate.suites.ruler.ruler_words import single_words
from endprompt_megatron.evaluate.suites.ruler.sources import Sources
from endprompt_megatron.evaluate.suites.ruler.templates import Template
from endprompt_megatron.evaluate.suites.ruler.token_budget import Room, Sample, shuffled

COMMON = 10


class CommonWords:
    """The task cwe at one length: COMMON words stand 30 times each among others that stand 3 times."""

    def __init__(self, task: Task, template: Template, room: Room, seed: int, sources: Sources) -> None:
        self.room, self.seed, self.rng, self.sources = room, seed, random.Random(seed), sources
        self.template = template.of(task)
        self.words, self.long_list = shuffled(single_words(), seed), False
        # Different words of the example, and how often common and other words stand in it and in the list.
        self.example, self.repeats = (40, 10, 3), (30, 3)
        if room.length < 4096:
            self.example, self.repeats = (20, 3, 1), (6, 1)

    def samples(self) -> Iterator[Sample]:
        """Without end."""
        tokens = len(self.room.encode(self._draw(4096)[0])) / 4096
        high = max(int(self.room.length // tokens) * 2, 20)
        units = self.room.search(self._draw, 10, high)
        while True:
            yield dataclasses.replace(self.room.sample(self._draw, units, 10), long_list=self.long_list)

    def _draw(self, units: int) -> tuple[str, list[str]]:
        context, common = self._list(*self.example)
        answer = " ".join(f"{place}. {word}" for place, word in enumerate(common, 1))
        example = f"{self.template.format(context=context)} {answer}"
        context, common = self._list(units, *self.repeats)
        return f"{example}\n{self.template.format(context=context)}", common

    def _list(self, count: int, common_repeats: int, other_repeats: int) -> tuple[str, list[str]]:
        pool = self.words
        if count > len(pool):
            # Even if only the search comes here: the random stream goes on from it.
            pool, self.long_list = self.sources.english_words, True
        if count > len(pool):
            raise InputError(
                f"--english-words: {len(pool)} words are too few for cwe in {self.room.length} tokens, which may take "
                f"{count}; give a longer list"
            )
        drawn = self.rng.sample(pool, count)
        common, others = drawn[:COMMON], drawn[COMMON:]
        listed = shuffled(common * common_repeats + others * other_repeats, self.seed)
        return " ".join(f"{place}. {word}" for place, word in enumerate(listed, 1)), common


class CodedWords:
    """The task fwe at one length: coded words by a zeta distribution (exponent 2) whose most frequent one is dots."""

    LETTERS, ZETA_2 = 6, np.pi**2 / 6

    def __init__(self, task: Task, template: Template, room: Room, seed: int, sources: Sources) -> None:
        self.room, self.seed, self.rng = room, seed, random.Random(seed)
        self.template = template.of(task)
        self.limit = room.length - room.new_tokens
        self.different = self.limit // 50
        self.step = self.limit // 32

    def samples(self) -> Iterator[Sample]:
        """Without end.  Raises InputError for a length with fewer than four different words."""
        if self.different < 4:
            raise self.room.too_short()
        text = self._drawn()
        first = self.limit // self.LETTERS

        # NVIDIA takes step after step until the text is too long.  More steps never give fewer of any word, so the
        # number of tokens only grows, and the first step that is too long can be found by halving.
        def tokens(steps: int) -> int:
            return len(self.room.encode(text(first + steps * self.step)[0]))

        high = 1
        while tokens(high) < self.limit:
            high *= 2
        words = first + (bisect.bisect_left(range(high), self.limit, key=tokens) - 1) * self.step
        while True:
            yield self._sample(words)

    def _sample(self, words: int) -> Sample:
        text = self._drawn()
        while True:
            prompt, references = text(words)
            ids = self.room.encode(prompt)
            if len(ids) <= self.limit:
                return Sample(prompt, ids, references)
            if words <= 0:
                raise self.room.too_short()
            words -= self.step

    def _drawn(self) -> Callable[[int], tuple[str, list[str]]]:
        """New coded words, as the function that makes of a number of words a prompt and its references."""
        names: list[str] = []
        seen: set[str] = set()
        while len(names) < self.different or len(seen) < self.different:
            names.append("".join(self.rng.choices(string.ascii_lowercase, k=self.LETTERS)))
            seen.add(names[-1])
        coded = ["...", *shuffled(sorted(seen), self.seed)[1:]]
        share = np.arange(1, len(coded) + 1) ** -2.0

        def text(words: int) -> tuple[str, list[str]]:
            counts = (words * share / self.ZETA_2).astype(int).tolist()
            listed = [word for word, count in zip(coded, counts, strict=True) for _ in range(count)]
            return self.template.format(context=" ".join(shuffled(listed, self.seed))), coded[1:4]

        return text
