"""A published benchmark as a suite: questions whose answers are generated and then scored, as RULER's and LongBench's.

A benchmark brings `questions` (lazily, in a fixed order), `score` of a question and an answer, 0..1, and `summary` of
(question without its prompt, answer, score) tuples; here they become requests, results and series.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.evaluate.engines.base import Prompt
from endprompt_megatron.evaluate.intervals import Series
from endprompt_megatron.evaluate.question import Question
from endprompt_megatron.evaluate.requests import Answered, Entry, Item, content_of
from endprompt_megatron.evaluate.suite import Prepared, Subject
from endprompt_megatron.tokenizer import Tokenizer


@dataclass(frozen=True)
class Benchmark:
    """A benchmark with its settings.  `groups`: means that are reported, name -> tasks."""

    name: str
    questions: Callable[[Tokenizer], Iterator[Question]]
    score: Callable[[Question, str], float]
    summary: Callable[[Iterable[tuple[Question, str, float]]], dict]
    sources: Callable[[], dict]  # what the questions are made from
    by_length: bool
    groups: dict[str, Sequence[str]] = field(default_factory=dict)

    def prepare(self, subject: Subject, count: int, tokens: float) -> Prepared:
        """The benchmark for one model: `count` questions of about `tokens` each."""
        window = None if subject.settings.beyond_window else subject.model.window
        return Prepared(
            requests=lambda: self._requests(subject.tokenizer, window),
            result=self._result,
            series=self._series,
            expected=(count, round(count * tokens)),
        )

    def _requests(self, tokenizer: Tokenizer, window: int | None) -> Iterator[Item]:
        """A request for each question.  Raises InputError for one beyond the model's window."""
        for question in self.questions(tokenizer):
            # As the benchmarks count, BOS is not of the length that an input is made for.
            with_bos = question.prompt[:1] == [tokenizer.bos_id]
            needed = len(question.prompt) - with_bos + question.max_new_tokens
            if window is not None and needed > window:
                raise InputError(
                    f"--suite {self.name}: {question.task} takes {needed} tokens, above the model's window of "
                    f"{window}; use shorter --lengths, or --beyond-window to ask nevertheless"
                )
            yield self._request(question, tokenizer)

    def _request(self, question: Question, tokenizer: Tokenizer) -> Item:
        stop = question.stop

        def ended(generated: list[int]) -> bool:
            return any(text in tokenizer.decode(generated) for text in stop)

        def read(generated: list[int]) -> dict:
            return {"answer": cut(tokenizer.decode(generated), stop), "tokens": len(generated)}

        notes = {"references": question.references, "extra": question.extra, "max_new_tokens": question.max_new_tokens}
        return Item(
            entry=Entry(self.name, question.task, question.length, question.number, notes | {"suite": question.suite}),
            content=content_of(np.asarray(question.prompt), question.max_new_tokens, stop),
            tokens=len(question.prompt),
            prompt=Prompt(question.prompt, question.max_new_tokens, ended if stop else None),
            read=read,
        )

    def _result(self, pairs: list[Answered]) -> dict:
        return {**self.summary(self._scored(pairs)), "sources": _plain(self.sources())}

    def _series(self, pairs: list[Answered]) -> list[Series]:
        """Scores 0..1 by task and length, their means by length and over all, and the means of groups."""
        scores: dict[tuple[str, int], list[float]] = {}
        for question, _, score in self._scored(pairs):
            key = question.task, question.length if self.by_length else 0
            scores.setdefault(key, []).append(float(score))
        arrays = {key: np.asarray(values) for key, values in scores.items()}
        found = [self._of(task, length, [values]) for (task, length), values in arrays.items()]
        if self.by_length:
            for length in sorted({length for _, length in arrays}):
                found.append(self._of("mean", length, [v for (_, n), v in arrays.items() if n == length]))
            found.append(self._of("mean", 0, list(arrays.values())))
        for group, tasks in self.groups.items():
            there = [values for (task, _), values in arrays.items() if task in tasks]
            if there:
                found.append(self._of(group, 0, there))
        return found

    def _of(self, task: str, length: int, strata: Iterable[np.ndarray]) -> Series:
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
            scored.append((question, record["answer"], self.score(question, record["answer"])))
        return scored


def cut(text: str, stop: tuple[str, ...]) -> str:
    """The text up to the first of the stop texts."""
    return text[: min([len(text), *(place for place in map(text.find, stop) if place >= 0)])]


def _plain(value: Any) -> Any:
    """JSON of what a benchmark says of its sources: dataclasses and paths included."""
    if dataclasses.is_dataclass(value):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
