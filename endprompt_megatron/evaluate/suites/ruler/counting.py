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
from endprompt_megatron.evaluate.suites.ruler.token_budget import FittedPrompt, TokenBudget, shuffled

COMMON = 10


class CommonWords:
    """The task cwe at one length: COMMON words stand 30 times each among others that stand 3 times."""

    def __init__(self, task: Task, template: Template, budget: TokenBudget, seed: int, sources: Sources) -> None:
        self.budget, self.seed, self.rng, self.sources = budget, seed, random.Random(seed), sources
        self.template = template.of(task)
        self.words, self.long_list = shuffled(single_words(), seed), False
        # Different words of the example, and how often common and other words stand in it and in the list.
        self.example, self.repeats = (40, 10, 3), (30, 3)
        if budget.length < 4096:
            self.example, self.repeats = (20, 3, 1), (6, 1)

    def prompts(self) -> Iterator[FittedPrompt]:
        """Without end."""
        tokens = len(self.budget.encode(self._draw(4096)[0])) / 4096
        high = max(int(self.budget.length // tokens) * 2, 20)
        units = self.budget.search(self._draw, 10, high)
        while True:
            yield dataclasses.replace(self.budget.fit(self._draw, units, 10), long_list=self.long_list)

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
                f"--english-words: {len(pool)} words are too few for cwe in {self.budget.length} tokens, which may "
                f"{count}; give a longer list"
            )
        drawn = self.rng.sample(pool, count)
        common, others = drawn[:COMMON], drawn[COMMON:]
        listed = shuffled(common * common_repeats + others * other_repeats, self.seed)
        return " ".join(f"{place}. {word}" for place, word in enumerate(listed, 1)), common


class CodedWords:
    """The task fwe at one length: coded words by a zeta distribution (exponent 2) whose most frequent one is dots."""

    LETTERS, ZETA_2 = 6, np.pi**2 / 6

    def __init__(self, task: Task, template: Template, budget: TokenBudget, seed: int, sources: Sources) -> None:
        self.budget, self.seed, self.rng = budget, seed, random.Random(seed)
        self.template = template.of(task)
        self.limit = budget.length - budget.new_tokens
        self.different = self.limit // 50
        self.step = self.limit // 32

    def prompts(self) -> Iterator[FittedPrompt]:
        """Without end.  Raises InputError for a length with fewer than four different words."""
        if self.different < 4:
            raise self.budget.too_short()
        text = self._drawn()
        first = self.limit // self.LETTERS

        # NVIDIA takes step after step until the text is too long.  More steps never give fewer of any word, so the
        # number of tokens only grows, and the first step that is too long can be found by halving.
        def tokens(steps: int) -> int:
            return len(self.budget.encode(text(first + steps * self.step)[0]))

        high = 1
        while tokens(high) < self.limit:
            high *= 2
        words = first + (bisect.bisect_left(range(high), self.limit, key=tokens) - 1) * self.step
        while True:
            yield self._sample(words)

    def _sample(self, words: int) -> FittedPrompt:
        text = self._drawn()
        while True:
            prompt, references = text(words)
            ids = self.budget.encode(prompt)
            if len(ids) <= self.limit:
                return FittedPrompt(prompt, ids, references)
            if words <= 0:
                raise self.budget.too_short()
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
