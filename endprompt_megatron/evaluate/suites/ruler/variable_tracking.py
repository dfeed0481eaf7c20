"""Variable tracking: a chain of assignments among noise, after one worked example; which variables hold the value?"""

import itertools
import random
import string
from collections.abc import Iterator

import numpy as np

from endprompt_megatron.evaluate.suites.ruler.niah import NOISE
from endprompt_megatron.evaluate.suites.ruler.ruler_tasks import Task
from endprompt_megatron.evaluate.suites.ruler.sources import Sources
from endprompt_megatron.evaluate.suites.ruler.templates import BASE, Template, template
from endprompt_megatron.evaluate.suites.ruler.token_budget import FittedPrompt, TokenBudget, Unlucky

VARIABLES = 5
EXAMPLE_TOKENS, EXAMPLE_VALUE = 500, "12345"


class Tracing:
    """The task vt at one length."""

    def __init__(self, task: Task, wanted: Template, budget: TokenBudget, seed: int, sources: Sources) -> None:
        self.budget, self.rng, self.numbers = budget, random.Random(seed), np.random.RandomState(seed)
        self.template, self.example_template = wanted.of(task), template(BASE).of(task)
        self.opening = task.question[:20]

    def prompts(self) -> Iterator[FittedPrompt]:
        """Without end."""
        budget = TokenBudget(self.budget.task, EXAMPLE_TOKENS, 0, self.budget.encode)
        example = budget.fit(self._draw_example, budget.search_from_estimate(self._draw_example, 5), 5)
        text = f"{example.text} {' '.join(example.references)}\n"

        def with_example(units: int) -> tuple[str, list[str]]:
            asked, references = self._draw(units)
            at = asked.index(self.opening)
            return asked[:at] + self._renamed(text) + "\n" + asked[at:], references

        step = 10 if self.budget.length >= 4096 else 5
        units = self.budget.search_from_estimate(self._draw, step, beside=len(self.budget.encode(text)))
        while True:
            yield self.budget.fit(with_example, units, step)

    def _draw(self, units: int) -> tuple[str, list[str]]:
        names = self._names(5)
        value = str(self.numbers.randint(10000, 99999))
        if len(names) > VARIABLES:
            self.numbers.randint(10000, 99999)  # a second chain is begun before NVIDIA's script fails on it
            raise Unlucky
        return self._text(self.template, units, names, value), names

    def _draw_example(self, units: int) -> tuple[str, list[str]]:
        names = self._names(3)
        if len(names) > VARIABLES:
            raise Unlucky
        return self._text(self.example_template, units, names, EXAMPLE_VALUE), names

    def _names(self, letters: int) -> list[str]:
        """VARIABLES names; more, with a repeat among them, if some were drawn twice."""
        names: list[str] = []
        while len(names) < VARIABLES or len(set(names)) < VARIABLES:
            names.append("".join(self.rng.choices(string.ascii_uppercase, k=letters)))
        return names

    def _text(self, form: str, units: int, names: list[str], value: str) -> str:
        assignments = [f"VAR {names[0]} = {value}"]
        assignments += [f"VAR {name} = VAR {before} " for before, name in itertools.pairwise(names)]
        lines = [NOISE] * units
        places = sorted(self.rng.sample(range(units), len(assignments)))
        for passed, (place, assignment) in enumerate(zip(places, assignments, strict=True)):
            lines.insert(place + passed, assignment)
        return form.format(context="\n".join(lines), query=value, num_v=VARIABLES)

    def _renamed(self, example: str) -> str:
        """The worked example with other names and another value."""
        for name in example.split()[-VARIABLES:]:
            example = example.replace(name, "".join(self.rng.choices(string.ascii_uppercase, k=len(name))))
        return example.replace(EXAMPLE_VALUE, str(self.numbers.randint(10000, 99999)))
