"""Questions over documents, the right ones among others of the same data set (qa_1: SQuAD, qa_2: HotpotQA)."""

import bisect
import itertools
import random
from collections.abc import Iterator

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.evaluate.suites.ruler.ruler_tasks import Task
from endprompt_megatron.evaluate.suites.ruler.sources import Asked, Sources
from endprompt_megatron.evaluate.suites.ruler.templates import Template
from endprompt_megatron.evaluate.suites.ruler.token_budget import FittedPrompt, TokenBudget, shuffled

STEP = 10


class Documents:
    """One qa task at one length."""

    def __init__(self, task: Task, template: Template, budget: TokenBudget, seed: int, sources: Sources) -> None:
        self.budget, self.seed, self.rng = budget, seed, random.Random(seed)
        self.template = template.of(task)
        self.name = task.arguments["dataset"]
        self.asked, self.documents = sources.questions(self.name)

    def prompts(self) -> Iterator[FittedPrompt]:
        """Raises InputError where the data set has no more questions."""
        units = self.budget.search_from_estimate(lambda units: self._draw(self.asked[0], units), STEP)
        for asked in self.asked:
            yield self.budget.fit(lambda units, asked=asked: self._draw(asked, units), units, STEP)
        raise InputError(
            f"--{self.name}: holds {len(self.asked)} questions with an answer; use a smaller --ruler-samples"
        )

    def _draw(self, asked: Asked, units: int) -> tuple[str, list[str]]:
        there = len(self.documents)
        if units >= there:
            chosen = list(itertools.islice(itertools.cycle(range(there)), units))
        elif units - len(asked.own) > len(asked.near):
            own = [*asked.own, *asked.near]
            chosen = own + self._others(own, units - len(own))
        else:
            chosen = [*asked.own, *self.rng.sample(asked.near, units - len(asked.own))]
        listed = shuffled([self.documents[place] for place in chosen], self.seed)
        context = "\n\n".join(f"Document {number}:\n{text}" for number, text in enumerate(listed, 1))
        return self.template.format(context=context, query=asked.question), list(asked.answers)

    def _others(self, own: list[int], count: int) -> list[int]:
        """Places of `count` documents that are not among `own`, without a list of all the others."""
        taken = sorted(set(own))
        # The k-th of those not taken is k plus the taken ones before it.
        free_before = [place - number for number, place in enumerate(taken)]
        drawn = self.rng.sample(range(len(self.documents) - len(taken)), count)
        return [place + bisect.bisect_right(free_before, place) for place in drawn]
