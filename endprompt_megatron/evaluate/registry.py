"""Suites that are modules of questions: where they are, their settings from the command line's, and their statistics.

Such a module has `questions(settings, tokenizer)`, `score(question, answer)` and `summary(scored)`, where scored is
a list of (question without its prompt, answer, score); optionally `check(settings)`, which raises InputError for what
is wrong and may count the questions of each task, and `sources(settings)`, which says what they are made from.
"""

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from endprompt_megatron.common.errors import InputError, Unavailable
from endprompt_megatron.evaluate.engines.base import Prompt
from endprompt_megatron.evaluate.intervals import Series
from endprompt_megatron.evaluate.question import Question
from endprompt_megatron.evaluate.requests import Answered, Entry, Item, content_of
from endprompt_megatron.evaluate.settings import Settings
from endprompt_megatron.tokenizer import Tokenizer


@dataclass(frozen=True)
class Kind:
    """A suite.  `settings(module, of the command line, the model's directory, its window)` makes the module's own."""

    module: str
    settings: Callable[[ModuleType, Settings, Path, int], Any]
    by_length: bool  # whether questions come in --lengths; otherwise a question may be cut for each model's window
    # Means that are reported: name -> tasks, by the module and its settings.
    groups: Callable[[ModuleType, Any], dict[str, list[str]]] = lambda *_: {}


def _ruler(module: ModuleType, settings: Settings, directory: Path, window: int) -> Any:
    files = {name: getattr(settings, name) for name in ("haystack", "squad", "hotpotqa", "english_words", "punkt")}
    return module.RulerSettings(
        lengths=tuple(settings.lengths),
        tasks=tuple(settings.ruler_tasks or module.TASKS),
        samples=settings.ruler_samples,
        seed=settings.ruler_seed,
        template=settings.ruler_template or settings.template,
        model=directory,
        **{name: Path(file) for name, file in files.items() if file is not None},
    )


def _longbench(module: ModuleType, settings: Settings, directory: Path, window: int) -> Any:
    if settings.longbench_data is None:
        raise Unavailable(
            "--longbench-data: missing; --suite longbench needs the benchmark's data.zip, or the directory "
            "with its data/*.jsonl"
        )
    return module.LongBenchSettings(
        data=Path(settings.longbench_data),
        max_length=module.default_max_length(window),
        tasks=tuple(settings.longbench_tasks) if settings.longbench_tasks else None,
        extended=settings.longbench_e,
        limit=settings.limit,
        chat=module.chat_wrapper(directory) if settings.template == "chat" else None,
    )


def _longbench_groups(module: ModuleType, settings: Any) -> dict[str, list[str]]:
    """The groups and the mean that the paper reports, which leave the Chinese tasks out, and the mean of all."""
    tasks = importlib.import_module(f"{module.__name__}.longbench_tasks")
    if settings.extended:
        return {"mean_13": list(tasks.EXTENDED_TASKS)}
    groups = {group: [n for n in tasks.NOT_CHINESE if tasks.TASKS[n].group == group] for group in tasks.GROUPS}
    return {**groups, "mean_16": list(tasks.NOT_CHINESE), "mean_21": list(tasks.TASKS)}


KINDS = {
    "ruler": Kind("endprompt_megatron.evaluate.suites.ruler", _ruler, by_length=True),
    "longbench": Kind(
        "endprompt_megatron.evaluate.suites.longbench", _longbench, by_length=False, groups=_longbench_groups
    ),
}


class QuestionSuite:
    """A suite of questions for one model."""

    def __init__(self, name: str, settings: Settings, directory: Path, window: int, tokenizer: Tokenizer) -> None:
        """Raises InputError for settings or files that the suite cannot use, Unavailable for data not given."""
        self.name, self.kind, self.tokenizer = name, KINDS[name], tokenizer
        self.window = None if settings.beyond_window else window
        try:
            self.module = importlib.import_module(self.kind.module)
        except ModuleNotFoundError as error:
            raise InputError(f"--suite {name}: needs {error.name}, which is not installed") from None
        self.settings = self.kind.settings(self.module, settings, directory, window)
        check = getattr(self.module, "check", None)
        counts = check(self.settings) if check else None
        self.count = sum(counts.values()) if isinstance(counts, dict) else None  # of questions, if it is known

    def items(self) -> Iterator[Item]:
        """An item a question, made when it is its turn.  Raises InputError for one beyond the model's window."""
        for question in self.module.questions(self.settings, self.tokenizer):
            # As the benchmarks count, BOS is not of the length that an input is made for.
            with_bos = question.prompt[:1] == [self.tokenizer.bos_id]
            needed = len(question.prompt) - with_bos + question.max_new_tokens
            if self.window is not None and needed > self.window:
                raise InputError(
                    f"--suite {self.name}: {question.task} takes {needed} tokens, above the model's window of "
                    f"{self.window}; use shorter --lengths, or --beyond-window to ask nevertheless"
                )
            yield self._item(question)

    def _item(self, question: Question) -> Item:
        stop = question.stop

        def ended(generated: list[int]) -> bool:
            return any(text in self.tokenizer.decode(generated) for text in stop)

        def read(generated: list[int]) -> dict:
            return {"answer": cut(self.tokenizer.decode(generated), stop), "tokens": len(generated)}

        notes = {"references": question.references, "extra": question.extra, "max_new_tokens": question.max_new_tokens}
        return Item(
            entry=Entry(self.name, question.task, question.length, question.number, notes | {"suite": question.suite}),
            content=content_of(np.asarray(question.prompt), question.max_new_tokens, stop),
            tokens=len(question.prompt),
            prompt=Prompt(question.prompt, question.max_new_tokens, ended if stop else None),
            read=read,
        )

    def result(self, pairs: list[Answered]) -> dict:
        """The module's own summary, and what the questions are made from where it tells."""
        found = self.module.summary(self._scored(pairs))
        sources = getattr(self.module, "sources", None)
        return {**found, "sources": _plain(sources(self.settings))} if sources else found

    def series(self, pairs: list[Answered]) -> list[Series]:
        """Scores 0..1 by task and length, their means by length and over all, and the means of groups."""
        scores: dict[tuple[str, int], list[float]] = {}
        for question, _, score in self._scored(pairs):
            key = question.task, question.length if self.kind.by_length else 0
            scores.setdefault(key, []).append(float(score))
        arrays = {key: np.asarray(values) for key, values in scores.items()}
        found = [self._series(task, length, [values]) for (task, length), values in arrays.items()]
        if self.kind.by_length:
            for length in sorted({length for _, length in arrays}):
                found.append(self._series("mean", length, [v for (_, n), v in arrays.items() if n == length]))
            found.append(self._series("mean", 0, list(arrays.values())))
        for group, tasks in self.kind.groups(self.module, self.settings).items():
            there = [values for (task, _), values in arrays.items() if task in tasks]
            if there:
                found.append(self._series(group, 0, there))
        return found

    def _series(self, task: str, length: int, strata: Iterable[np.ndarray]) -> Series:
        return Series(self.name, task, length, "score", tuple(strata))

    def _scored(self, pairs: list[Answered]) -> list[tuple[Question, str, float]]:
        scored = []
        for entry, record in pairs:
            notes = entry.notes
            question = Question(
                suite=notes["suite"],
                task=entry.task,
                length=entry.length,
                number=entry.number,
                prompt=[],
                max_new_tokens=notes["max_new_tokens"],
                references=notes["references"],
                extra=notes["extra"],
            )
            scored.append((question, record["answer"], self.module.score(question, record["answer"])))
        return scored


def cut(text: str, stop: tuple[str, ...]) -> str:
    """The text up to the first of the stop texts."""
    return text[: min([len(text), *(place for place in map(text.find, stop) if place >= 0)])]


def _plain(value: Any) -> Any:
    """JSON of what a module returned: dataclasses and paths included."""
    if dataclasses.is_dataclass(value):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
