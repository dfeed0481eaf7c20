"""Needles in a haystack: sentences that give magic numbers or uuids for words or uuids, asked for at the end."""

import itertools
import random
import uuid
from collections.abc import Callable, Iterator

from endprompt_megatron.evaluate.suites.ruler.ruler_tasks import Task
from endprompt_megatron.evaluate.suites.ruler.ruler_words import pairs
from endprompt_megatron.evaluate.suites.ruler.sources import Sources
from endprompt_megatron.evaluate.suites.ruler.templates import Template
from endprompt_megatron.evaluate.suites.ruler.token_budget import FittedPrompt, TokenBudget, shuffled

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DEPTHS = [round(100 * step / 39) for step in range(40)]  # percent of the essay's sentences


class Needles:
    """One niah task at one length."""

    def __init__(self, task: Task, template: Template, budget: TokenBudget, seed: int, sources: Sources) -> None:
        arguments = task.arguments
        self.budget, self.seed, self.rng, self.sources = budget, seed, random.Random(seed), sources
        self.haystack = arguments["haystack"]
        self.key, self.value = self._draws(arguments["key"]), self._draws(arguments["value"])
        self.keys, self.values = arguments.get("keys", 1), arguments.get("values", 1)
        self.queries = arguments.get("queries", 1)
        self.kind = self.asked_kind = arguments["value"]
        reword: Callable[[str], str] = str
        if self.queries * self.values == 1:
            reword, self.asked_kind = _singular, self.kind.removesuffix("s")
        self.template = template.of(task, reword)

    def _draws(self, kind: str) -> Callable[[], str]:
        rng = self.rng
        return {
            "words": lambda: rng.choice(pairs()),
            "numbers": lambda: str(rng.randint(10**6, 10**7 - 1)),
            "uuids": lambda: str(uuid.UUID(int=rng.getrandbits(128), version=4)),
        }[kind]

    def prompts(self) -> Iterator[FittedPrompt]:
        """Without end."""
        step = 500 if self.haystack == "essay" else 25 if self.budget.length >= 4096 else 5
        units = self.budget.search_from_estimate(self._draw, step)
        while True:
            yield self.budget.fit(self._draw, units, step)

    def _draw(self, units: int) -> tuple[str, list[str]]:
        keys, values, needles = [], [], []
        for _ in range(self.keys):
            keys.append(self.key())
            values.append([self.value() for _ in range(self.values)])
            needles += [NEEDLE.format(kind=self.kind, key=keys[-1], value=value) for value in values[-1]]
        needles = shuffled(needles, self.seed)
        context = self._among_essays(units, needles) if self.haystack == "essay" else self._among_lines(units, needles)
        asked = self.rng.sample(range(self.keys), self.queries)
        *others, last = [keys[place] for place in asked]
        query = f"{', '.join(others)}, and {last}" if others else last
        text = self.template.format(type_needle_v=self.asked_kind, context=context, query=query)
        return text, [value for place in asked for value in values[place]]

    def _among_essays(self, units: int, needles: list[str]) -> str:
        sentences = self.sources.sentences(units)
        depths = self.rng.sample(DEPTHS, len(needles))
        places = [0, *sorted(int(len(sentences) * (depth / 100)) for depth in depths), len(sentences)]
        parts = [" ".join(sentences[start:end]) for start, end in itertools.pairwise(places)]
        mixed = [text for pair in zip(parts, needles, strict=False) for text in pair]
        return " ".join([*mixed, parts[-1]])

    def _among_lines(self, units: int, needles: list[str]) -> str:
        if self.haystack == "noise":
            lines = [NOISE] * units
        else:
            lines = [NEEDLE.format(kind=self.kind, key=self.key(), value=self.value()) for _ in range(units)]
        places = sorted(self.rng.sample(range(units), len(needles)), reverse=True)
        for place, needle in zip(places, needles, strict=True):
            lines.insert(place, needle)
        return "\n".join(lines)


def _singular(text: str) -> str:
    """The wording for one answer."""
    for plural, singular in (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer")):
        text = text.replace(plural, singular)
    return text
