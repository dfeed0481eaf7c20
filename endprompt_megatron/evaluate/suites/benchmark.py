"""A published benchmark as a suite: questions whose answers are generated and then scored, as RULER's and LongBench's.

A benchmark brings `samples` (lazily, in a fixed order), `score` of a sample and an answer, 0..1, and `summary` of
(sample without its prompt, answer, score) tuples; here they become requests, results and series.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.evaluate.engines.base import Prompt
from endprompt_megatron.evaluate.intervals import Series
from endprompt_megatron.evaluate.requests import Request, Response, content_of
from endprompt_megatron.evaluate.suite import Prepared, Subject
from endprompt_megatron.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sample:
    """One question with its prompt.  (suite, task, length, number) names it."""

    suite: str
    task: str
    length: int  # tokens that the input was made for, 0 if none
    number: int
    prompt: list[int]  # token ids, complete: template, answer prefix, BOS if there is to be one
    max_new_tokens: int
    references: list[str]
    stop: tuple[str, ...] = ()  # texts at which an answer ends
    extra: dict = field(default_factory=dict)  # what scoring needs beside the references, JSON


@dataclass(frozen=True)
class Benchmark:
    """A benchmark with its settings.  `groups`: means that are reported, name -> tasks."""

    name: str
    samples: Callable[[Tokenizer], Iterator[Sample]]
    score: Callable[[Sample, str], float]
    summary: Callable[[Iterable[tuple[Sample, str, float]]], dict]
    sources: Callable[[], dict]  # what the questions are made from
    by_length: bool
    groups: dict[str, Sequence[str]] = field(default_factory=dict)

    def prepare(self, subject: Subject, count: int, tokens: float) -> Prepared:
        """The benchmark for one model: `count` samples of about `tokens` each."""
        window = None if subject.settings.beyond_window else subject.model.window
        return Prepared(
            requests=lambda: self._requests(subject.tokenizer, window),
            result=self._result,
            series=self._series,
            expected=(count, round(count * tokens)),
        )

    def _requests(self, tokenizer: Tokenizer, window: int | None) -> Iterator[Request]:
        """A request for each sample.  Raises InputError for one beyond the model's window."""
        for sample in self.samples(tokenizer):
            # As the benchmarks count, BOS is not of the length that an input is made for.
            with_bos = sample.prompt[:1] == [tokenizer.bos_id]
            needed = len(sample.prompt) - with_bos + sample.max_new_tokens
            if window is not None and needed > window:
                raise InputError(
                    f"--suite {self.name}: {sample.task} takes {needed} tokens, above the model's window of "
                    f"{window}; use shorter --lengths, or --beyond-window to ask nevertheless"
                )
            yield self._request(sample, tokenizer)

    def _request(self, sample: Sample, tokenizer: Tokenizer) -> Request:
        stop = sample.stop

        def ended(generated: list[int]) -> bool:
            return any(text in tokenizer.decode(generated) for text in stop)

        def read(generated: list[int]) -> dict:
            return {"answer": cut(tokenizer.decode(generated), stop), "tokens": len(generated)}

        notes = {"references": sample.references, "extra": sample.extra, "max_new_tokens": sample.max_new_tokens}
        return Request(
            suite=self.name,
            task=sample.task,
            length=sample.length,
            number=sample.number,
            content=content_of(np.asarray(sample.prompt), sample.max_new_tokens, stop),
            tokens=len(sample.prompt),
            notes=notes | {"suite": sample.suite},
            prompt=Prompt(sample.prompt, sample.max_new_tokens, ended if stop else None),
            read=read,
        )

    def _result(self, responses: list[Response]) -> dict:
        return {**self.summary(self._scored(responses)), "sources": _plain(self.sources())}

    def _series(self, responses: list[Response]) -> list[Series]:
        """Scores 0..1 by task and length, their means by length and over all, and the means of groups."""
        scores: dict[tuple[str, int], list[float]] = {}
        for sample, _, score in self._scored(responses):
            key = sample.task, sample.length if self.by_length else 0
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

    def _scored(self, responses: list[Response]) -> list[tuple[Sample, str, float]]:
        scored = []
        for response in responses:
            notes, answer = response.notes, response.record["answer"]
            sample = Sample(
                suite=notes["suite"],
                task=response.task,
                length=response.length,
                number=response.number,
                prompt=[],
                max_new_tokens=notes["max_new_tokens"],
                references=notes["references"],
                extra=notes["extra"],
            )
            scored.append((sample, answer, self.score(sample, answer)))
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
