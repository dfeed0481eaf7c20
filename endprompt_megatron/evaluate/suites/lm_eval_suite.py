"""Short text as a suite: one item a task, each run by lm_eval.py with a model of its own, none of our engines."""

import functools
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np

from endprompt_megatron.common.errors import Unavailable
from endprompt_megatron.evaluate.intervals import Series
from endprompt_megatron.evaluate.requests import Answered, Entry, Item, content_of
from endprompt_megatron.evaluate.settings import Settings

MODULE = "endprompt_megatron.evaluate.suites.lm_eval"


class ShortSuite:
    """MMLU, GSM8K, HellaSwag, HumanEval or other tasks of lm-eval, for one model."""

    def __init__(self, settings: Settings, directory: Path) -> None:
        """Of tasks that nobody named, those that cannot be asked here are left out.

        Raises Unavailable if none is left or lm-eval is not installed, InputError if a named one cannot be asked.
        """
        self.module = importlib.import_module(MODULE)
        self.settings, self.directory = settings, directory
        tasks = settings.short_tasks or list(self.module.TASKS)
        reasons = _left_out(self.module, tuple(tasks))
        for task, reason in reasons.items():
            if settings.short_tasks:
                raise Unavailable(f"--short-tasks {task}: {reason}, or leave the task out")
            if len(reasons) == len(tasks):
                raise Unavailable(f"--suite short: {task} {reason}")
        self.left_out = {f"short {task}": reason for task, reason in reasons.items()}
        self.tasks = [task for task in tasks if task not in reasons]
        self.count = len(self.tasks)

    def items(self) -> Iterator[Item]:
        """An item a task: a killed evaluation goes on with the next, at the price of loading the model for each."""
        s = self.settings
        options = {"backend": "vllm" if s.engine == "vllm" else "hf", "dtype": s.dtype, "chat": s.template == "chat"}
        for task in self.tasks:

            def ask(_: object, task: str = task) -> dict:
                return self.module.run(self.directory, [task], s.limit, **options)

            yield Item(Entry("short", task, 0, 0), content_of(task, s.limit, options), 0, ask, alone=True)

    def result(self, pairs: list[Answered]) -> dict:
        """What short.run says of all the tasks together, scores in percent."""
        tasks = {name: row for _, record in pairs for name, row in record["tasks"].items()}
        there = [name for name in self.module.TASKS if name in tasks]
        missing = [name for name in self.module.TASKS if name not in tasks]
        return {
            "tasks": tasks,
            "mean": {
                "score": sum(tasks[name]["score"] for name in there) / len(there) if there else None,
                "complete": not missing and self.settings.limit is None,
                "missing": missing,
            },
            "limit": self.settings.limit,
            "lm_eval": pairs[0][1]["lm_eval"],
        }

    def series(self, pairs: list[Answered]) -> list[Series]:
        """Right and wrong answers by task, and the tasks' mean.  lm-eval's answers are counted, not told apart."""
        found = {name: _values(row) for _, record in pairs for name, row in record["tasks"].items()}
        series = [Series("short", task, 0, "score", (values,), paired=False) for task, values in found.items()]
        return [*series, Series("short", "mean", 0, "score", tuple(found.values()), paired=False)]


@functools.lru_cache(maxsize=1)
def _left_out(module: ModuleType, tasks: tuple[str, ...]) -> dict[str, str]:
    """Seconds, for lm-eval's import: asked once for all models."""
    return module.left_out(tasks)


def _values(row: dict) -> np.ndarray:
    """A 1 for every right answer and a 0 for every other; a lone score where it is not such a share."""
    score, count = row["score"] / 100, row["questions"]
    right = round(score * count)
    if abs(score * count - right) > 1e-6 * count:
        return np.asarray([score])
    return np.r_[np.ones(right), np.zeros(count - right)]
