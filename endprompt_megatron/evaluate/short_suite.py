"""Short text as a suite: one item a task, each measured by short.py with a model of its own, none of our engines.

short.py has `names(wanted, limit)`, the tasks that will be run, which raises InputError where lm-eval or its data is
not there; and `measure(directory, task, limit=, dtype=, seed=)`, which gives {"score": 0..1, "samples": count, ...}
and, if it knows them, "values": the score of every sample.
"""

import importlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from endprompt_megatron.errors import InputError
from endprompt_megatron.evaluate.items import Answered, Entry, Item, content_of
from endprompt_megatron.evaluate.settings import Settings
from endprompt_megatron.evaluate.statistics import Series

MODULE = "endprompt_megatron.evaluate.short"


class ShortSuite:
    """MMLU, GSM8K, HellaSwag, HumanEval through lm-eval, for one model."""

    def __init__(self, settings: Settings, directory: Path) -> None:
        """Raises InputError for tasks that cannot be run here."""
        try:
            self.module = importlib.import_module(MODULE)
        except ModuleNotFoundError as error:
            raise InputError(f"--suite short: needs {error.name}, which is not installed") from None
        self.settings, self.directory = settings, directory
        self.tasks = list(self.module.names(settings.short_tasks, settings.limit))
        self.count = len(self.tasks)

    def items(self) -> Iterator[Item]:
        """An item a task."""
        s = self.settings
        for task in self.tasks:

            def ask(_: object, task: str = task) -> dict:
                return self.module.measure(self.directory, task, limit=s.limit, dtype=s.dtype, seed=s.seed)

            yield Item(Entry("short", task, 0, 0), content_of(task, s.limit, s.seed), 0, ask, alone=True)

    def result(self, pairs: list[Answered]) -> dict:
        """{"tasks": {name: what was measured}}."""
        return {
            "tasks": {entry.task: {k: v for k, v in record.items() if k != "values"} for entry, record in pairs},
            "limit": self.settings.limit,
        }

    def series(self, pairs: list[Answered]) -> list[Series]:
        """Scores of the samples by task, and the tasks' mean; where a task does not tell them, its score alone."""
        found = [(entry.task, np.asarray(record.get("values") or [record["score"]])) for entry, record in pairs]
        series = [Series("short", task, 0, "score", (values,)) for task, values in found]
        return [*series, Series("short", "mean", 0, "score", tuple(values for _, values in found))]
