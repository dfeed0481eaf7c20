"""Recall at real input lengths, by distance: a fact stated in held-out text and asked for at its end.

The right answer is read along with the input (teacher forcing), so that a model need not know how to answer, only how
to continue.  Two scores:
  recalled  every token of the value is the most likely one given the true tokens before it;
  loss      nats a token of the value.
The distance is from the value in the fact to the value in the answer.  A form says what facts and questions look like;
a JSON file replaces it for a model that knows only one kind of text.
"""

import functools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.files import read_json
from endprompt_megatron.common.plotting import Palette, dress, legend, length_axis, short
from endprompt_megatron.common.text_table import text_table
from endprompt_megatron.evaluate.engines.base import Engine
from endprompt_megatron.evaluate.intervals import Series
from endprompt_megatron.evaluate.options import SAMPLES, TEXT, Option, parse_lengths
from endprompt_megatron.evaluate.plots import of_suite, window_mark
from endprompt_megatron.evaluate.requests import Request, Response, content_of
from endprompt_megatron.evaluate.suite import LOSS, Drawing, Headline, Metric, Prepared, Scores, Subject, Suite
from endprompt_megatron.evaluate.suites.needle import continuation
from endprompt_megatron.evaluate.tables import bounds_text, quoted_bounds, scores_of
from endprompt_megatron.tokenizer import Tokenizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AT_ONCE = 16384  # tokens of one forward pass
_TRIES = 1000  # keys drawn until one is not in the text
_WORDS = (
    "Alpha Bravo Charlie Delta Echo Foxtrot Golf Hotel India Juliet Kilo Lima Mike November Oscar Papa Quebec Romeo "
    "Sierra Tango Uniform Victor Whiskey Yankee Zulu"
).split()


@dataclass(frozen=True)
class Form:
    """Texts of a fact, which contains the answer, of a question, and of the answer that goes on from it."""

    fact: str = "\nThe code of {key} is {value}.\n"
    question: str = "\nThe code of {key} is"
    answer: str = " {value}"
    keys: tuple[str, ...] = tuple(_WORDS)
    key_words: int = 2
    values: tuple[str, ...] = tuple("0123456789")
    value_words: int = 5


def read_form(path: Path | str | None) -> Form:
    """The form of a JSON file with some of Form's fields; the usual one without.  Raises InputError."""
    if path is None:
        return Form()
    given = read_json(Path(path), "the form of facts and questions")
    unknown = set(given) - set(asdict(Form()))
    if unknown:
        raise InputError(
            f"--recall-form {path}: unknown {', '.join(sorted(unknown))}; it has {', '.join(asdict(Form()))}"
        )
    for name, value in given.items():
        usual = getattr(Form(), name)
        if isinstance(usual, tuple):
            if not isinstance(value, list) or not value or not all(isinstance(w, str) for w in value):
                raise InputError(f"--recall-form {path}: {name} should be a list of words")
            given[name] = tuple(value)
        elif type(value) is not type(usual) or (isinstance(value, int) and value < 1):
            what = "a text" if isinstance(usual, str) else "a number, at least 1"
            raise InputError(f"--recall-form {path}: {name}={value!r} should be {what}")
    form = Form(**given)
    if form.key_words > len(form.keys):
        raise InputError(
            f"--recall-form {path}: key_words={form.key_words}, but keys has {len(form.keys)} words; give more"
        )
    for name in ("fact", "question", "answer"):
        try:
            getattr(form, name).format(key="", value="")
        except (KeyError, IndexError, ValueError):
            raise InputError(
                f"--recall-form {path}: {name}={getattr(form, name)!r} should have no braces but {{key}} and {{value}}"
            ) from None
    for name, needs in (("fact", "{key}"), ("fact", form.answer.strip()), ("question", "{key}"), ("answer", "{value}")):
        if needs not in getattr(form, name):
            raise InputError(f"--recall-form {path}: {name}={getattr(form, name)!r} should have {needs} in it")
    return form


def default_distances(length: int) -> list[int]:
    """Powers of two from 64 up to half of the length, and three quarters and seven eighths of it."""
    powers = [2**exponent for exponent in range(6, 64) if 2**exponent <= length // 2]
    return [*powers, length * 3 // 4, length * 7 // 8]


def distances_of(length: int, distances: list[int] | None) -> list[int]:
    """The distances that are asked in inputs of that length: those of `distances` below it, or the usual ones."""
    return [each for each in distances if each < length] if distances else default_distances(length)


def expected(lengths: list[int], distances: list[int] | None, samples: int) -> tuple[int, int]:
    """How many requests, and how many tokens in all."""
    cells = {length: len(distances_of(length, distances)) for length in lengths}
    requests = sum(count * -(-samples // max(1, AT_ONCE // length)) for length, count in cells.items())
    return requests, sum(count * samples * length for length, count in cells.items())


def recall_requests(
    tokenizer: Tokenizer,
    text: np.ndarray,
    lengths: list[int],
    form: Form,
    *,
    distances: list[int] | None = None,
    samples: int = 1,
    seed: int = 0,
) -> Iterator[Request]:
    """`samples` inputs of every length and distance below it, several to a request.  `text` int64 [n]: held-out text.

    The same seed asks the same.  Raises InputError for a length that is longer than the text, or too short.
    """
    for length in lengths:
        for distance in distances_of(length, distances):
            rows, scored = [], []
            for sample in range(samples):
                # Keyed by place, not drawn in order: a cell stays the same when the grid changes.
                rng = np.random.default_rng([seed, length, distance, sample])
                row, answer = build_row(tokenizer, text, length, distance, form, rng)
                rows.append(row)
                scored.append(answer)
            size = max(1, AT_ONCE // length)
            for number, start in enumerate(range(0, samples, size)):
                tokens, answers = np.stack(rows[start : start + size]), scored[start : start + size]

                def ask(engine: Engine, tokens: np.ndarray = tokens, answers: list[int] = answers) -> dict:
                    return _ask(engine, tokens, answers)

                name = ("recall", f"{distance}", length, number)
                yield Request(*name, content_of(tokens, answers), tokens.size, ask=ask)


def _ask(engine: Engine, tokens: np.ndarray, answers: list[int]) -> dict:
    losses, right = engine.token_losses(tokens, last=max(answers))
    return {
        "recalled": [bool(row[-count:].all()) for row, count in zip(right, answers, strict=True)],
        "loss": [float(row[-count:].mean()) for row, count in zip(losses, answers, strict=True)],
    }


def build_row(
    tokenizer: Tokenizer, text: np.ndarray, length: int, distance: int, form: Form, rng: np.random.Generator
) -> tuple[np.ndarray, int]:
    """Text with a fact, the question and its answer: int64 [length], and how many tokens the answer has.

    The answer's first token stands `distance` behind the value's first token in the fact.  Raises InputError.
    """
    if len(text) < length:
        raise InputError(f"--lengths {length}: the held-out text has only {len(text)} tokens; give a longer --text")
    start = int(rng.integers(0, len(text) - length + 1))
    around = tokenizer.decode(text[start : start + length].tolist())
    value = " ".join(rng.choice(form.values, form.value_words))
    for _ in range(_TRIES):
        key = " ".join(rng.choice(form.keys, form.key_words, replace=False))
        if key not in around:
            break
    else:
        raise InputError(f"--recall-form: all keys are in {length} tokens of the text already; give more keys")
    before = form.fact.split(form.answer.strip())[0].format(key=key).rstrip()
    fact = tokenizer.encode(form.fact.format(key=key, value=value))
    question = tokenizer.encode(form.question.format(key=key))
    answer = continuation(tokenizer, form.question.format(key=key), form.answer.format(key=key, value=value))
    lead = len(tokenizer.encode(before))  # tokens of the fact before the answer in it
    room = length - len(fact) - len(question) - len(answer)
    place = length - len(answer) - distance - lead
    if room < 0 or not 0 <= place <= room:
        nearest, farthest = len(fact) - lead + len(question), length - len(answer) - lead
        raise InputError(
            f"--recall-distances {distance}: in {length} tokens a fact stands {nearest} to {farthest} tokens before "
            "its answer; use a distance between them"
        )
    hay = text[start : start + room]
    row = np.concatenate([hay[:place], fact, hay[place:], question, answer]).astype(np.int64)
    return row, len(answer)


def result(responses: list[Response]) -> dict:
    """{"cells": [{length, distance, samples, recalled, loss}]}."""
    return {
        "cells": [
            {
                "length": length,
                "distance": int(task),
                "samples": len(values["recalled"]),
                "recalled": float(np.mean(values["recalled"])),
                "loss": float(np.mean(values["loss"])),
            }
            for (task, length), values in _cells(responses).items()
        ]
    }


def series(responses: list[Response]) -> list[Series]:
    """Both scores of every cell, and of every length over its distances."""
    found: dict[tuple[str, int, str], list[float]] = {}
    for (task, length), values in _cells(responses).items():
        for metric in ("recalled", "loss"):
            for name in (task, "all distances"):
                found.setdefault((name, length, metric), []).extend(map(float, values[metric]))
    return [Series("recall", task, length, metric, (np.asarray(v),)) for (task, length, metric), v in found.items()]


def _cells(responses: list[Response]) -> dict[tuple[str, int], dict[str, list]]:
    cells: dict[tuple[str, int], dict[str, list]] = {}
    for response in responses:
        cell = cells.setdefault((response.task, response.length), {"recalled": [], "loss": []})
        for metric in cell:
            cell[metric] += response.record[metric]
    return cells


def form_as_json(form: Form) -> str:
    """What `read_form` reads."""
    return json.dumps(asdict(form), indent=1) + "\n"


def _prepare(subject: Subject) -> Prepared:
    s, tokenizer, text = subject.settings, subject.tokenizer, subject.tokens
    form = read_form(s.recall_form)
    for length in s.lengths:  # whether facts and questions fit
        for distance in distances_of(length, s.recall_distances):
            build_row(tokenizer, text, length, distance, form, np.random.default_rng(0))

    def requests() -> Iterator[Request]:
        return recall_requests(
            tokenizer, text, s.lengths, form, distances=s.recall_distances, samples=s.samples, seed=s.seed
        )

    return Prepared(requests, result, series, expected(s.lengths, s.recall_distances, s.samples))


def _tables(results: dict, labels: list[str]) -> list[str]:
    measured = [results["measurements"][label]["recall"]["cells"] for label in labels]
    header = ["length", "distance", *(f"{label} {what}" for label in labels for what in ("recalled", "95%", "loss"))]
    rows = []
    for cells in zip(*measured, strict=True):
        row = [str(cells[0]["length"]), str(cells[0]["distance"])]
        for label, cell in zip(labels, cells, strict=True):
            key = ("recall", str(cell["distance"]), cell["length"], "recalled")
            found = f"{round(cell['recalled'] * cell['samples'])} of {cell['samples']}"
            row += [found, bounds_text(scores_of(results, label).get(key), 100, 0), f"{cell['loss']:.3f}"]
        rows.append(row)
    return ["Facts recalled from held-out text, by distance\n" + text_table(header, rows)]


def _headlines(measured: dict, scores: Scores) -> list[Headline]:
    found = []
    for length in sorted({cell["length"] for cell in measured["cells"]}):
        cells = [cell for cell in measured["cells"] if cell["length"] == length]
        right = sum(round(cell["recalled"] * cell["samples"]) for cell in cells)
        key = ("recall", "all distances", length, "recalled")
        value = f"{right} of {sum(cell['samples'] for cell in cells)}"
        found.append(Headline(f"Facts recalled, {length:,} tokens", key, value, quoted_bounds(scores.get(key), 0, "%")))
    return found


def _drawings(results: dict) -> list[Drawing]:
    lengths = {cell["length"] for _, measured in of_suite(results, "recall") for cell in measured["cells"]}
    return [
        Drawing(f"Facts recalled in inputs of {length:,} tokens", functools.partial(_draw, length=length))
        for length in sorted(lengths)
    ]


def _draw(axes: "Axes", results: dict, palette: Palette, *, length: int) -> None:
    """The share of facts recalled against their distance, in inputs of one length."""
    every: set[int] = set()
    for label, measured in of_suite(results, "recall"):
        cells = [cell for cell in measured["cells"] if cell["length"] == length]
        distances = [cell["distance"] for cell in cells]
        axes.plot(distances, [cell["recalled"] for cell in cells], **palette.line(label))
        every |= set(distances)
    axes.set_ylim(-0.03, 1.03)
    length_axis(axes, sorted(every))
    title = f"Facts recalled in inputs of {short(length)}"
    dress(axes, palette, title, "distance in tokens", "share of facts")
    window_mark(axes, results, palette)
    legend(axes, palette)


def _explanation(measured: dict) -> str:
    samples = measured["cells"][0]["samples"]
    return (
        f"A fact stands in held-out text and is asked for at the end of it: {samples} "
        f"{'inputs' if samples > 1 else 'input'} for each length and distance. It counts as recalled if every token of "
        "it is the model's first choice, given the true tokens before it."
    )


SUITE = Suite(
    name="recall",
    title="Recall",
    about="a fact in held-out text, asked for at its end, by the length of the input and the distance of the fact",
    options=(
        TEXT,
        SAMPLES,
        Option(
            "recall_distances",
            "how far facts are away, in tokens; by default powers of 2, 3/4 and 7/8 of the length",
            parse=parse_lengths,
            metavar="LENGTHS",
        ),
        Option("recall_form", "JSON: what facts and questions look like", metavar="FILE", is_file=True),
    ),
    prepare=_prepare,
    reads_text=lambda settings: True,
    real_lengths=lambda settings: {"--lengths": settings.lengths},
    inputs_from=("samples", "recall_form", "seed"),
    metrics=(Metric("recalled"), LOSS),
    means=("all distances",),
    task_names={"all distances": ""},
    tasks_are_distances=True,
    headlines=_headlines,
    tables=_tables,
    drawings=_drawings,
    explanation=_explanation,
)
