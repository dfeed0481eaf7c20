"""Recall at real input lengths, by distance: a fact stated in held-out text and asked for at its end.

The right answer is read along with the input (teacher forcing), so that a model need not know how to answer, only how
to continue.  Two scores:
  recalled  every token of the value is the most likely one given the true tokens before it;
  loss      nats a token of the value.
recall_inputs.py makes the inputs.
"""

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.plotting import Palette, dress, legend, length_axis, short
from endprompt_megatron.common.text_table import text_table
from endprompt_megatron.evaluate.intervals import Series
from endprompt_megatron.evaluate.options import SAMPLES, TEXT, Option, parse_lengths
from endprompt_megatron.evaluate.plots import of_suite, window_mark
from endprompt_megatron.evaluate.requests import Request, Response
from endprompt_megatron.evaluate.suite import LOSS, Drawing, Headline, Metric, Prepared, Scores, Subject, Suite
from endprompt_megatron.evaluate.suites.recall_inputs import (
    TOGETHER,
    build_row,
    build_together,
    distances_of,
    expected,
    read_form,
    recall_requests,
    requests_together,
)
from endprompt_megatron.evaluate.tables import bounds_text, quoted_bounds, scores_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PASSAGE = "passage"


def result(responses: list[Response]) -> dict:
    """{"cells": [{length, distance, samples, recalled, loss}]}; with a passage {"passage": [{length, loss}]} too."""
    passage = [
        {"length": length, "loss": float(np.mean(losses))} for length, losses in _passage_losses(responses).items()
    ]
    return ({"passage": passage} if passage else {}) | {
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
    """Both scores of every cell, and of every length over its distances; a passage's losses."""
    found: dict[tuple[str, int, str], list[float]] = {}
    for (task, length), values in _cells(responses).items():
        for metric in ("recalled", "loss"):
            for name in (task, "all distances"):
                found.setdefault((name, length, metric), []).extend(map(float, values[metric]))
    found |= {(PASSAGE, length, "loss"): losses for length, losses in _passage_losses(responses).items()}
    return [Series("recall", task, length, metric, (np.asarray(v),)) for (task, length, metric), v in found.items()]


def _passage_losses(responses: list[Response]) -> dict[int, list[float]]:
    """Mean losses of a passage's blocks by the length of the input."""
    found: dict[int, list[float]] = {}
    for response in responses:
        for each in response.record.get("passage", []):
            found.setdefault(each["length"], []).extend(each["blocks"])
    return found


def _cells(responses: list[Response]) -> dict[tuple[str, int], dict[str, list]]:
    """Values of both metrics by (distance, length)."""
    cells: dict[tuple[str, int], dict[str, list]] = {}
    for response in responses:
        if response.task == TOGETHER:
            found = [(str(fact["distance"]), fact["length"], fact) for fact in response.record["facts"]]
        else:
            found = [
                (response.task, response.length, {"recalled": recalled, "loss": loss})
                for recalled, loss in zip(response.record["recalled"], response.record["loss"], strict=True)
            ]
        for distance, length, scores in found:
            cell = cells.setdefault((distance, length), {"recalled": [], "loss": []})
            for metric, values in cell.items():
                values.append(scores[metric])
    return cells


def _prepare(subject: Subject) -> Prepared:
    s, tokenizer, text = subject.settings, subject.tokenizer, subject.tokens
    form = read_form(s.recall_form)
    if s.recall_passage and not s.recall_together:
        raise InputError(f"--recall-passage {s.recall_passage}: needs --recall-together, whose text it goes on from")
    if s.recall_together:  # whether facts and questions fit
        rng = np.random.default_rng([s.seed, 0])
        build_together(tokenizer, text, s.lengths, s.recall_distances, form, rng, s.recall_passage)
    else:
        for length in s.lengths:
            for distance in distances_of(length, s.recall_distances):
                build_row(tokenizer, text, length, distance, form, np.random.default_rng(0))

    def requests() -> Iterator[Request]:
        asked = dict(distances=s.recall_distances, samples=s.samples, seed=s.seed)
        if s.recall_together:
            return requests_together(tokenizer, text, s.lengths, form, passage=s.recall_passage, **asked)
        return recall_requests(tokenizer, text, s.lengths, form, **asked)

    return Prepared(requests, result, series, expected(s.lengths, s.recall_distances, s.samples, s.recall_together))


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
    parts = ["Facts recalled from held-out text, by distance\n" + text_table(header, rows)]
    passages = [results["measurements"][label]["recall"].get("passage") for label in labels]
    if all(passages):
        rows = [[str(of[0]["length"]), *(f"{each['loss']:.3f}" for each in of)] for of in zip(*passages, strict=True)]
        title = "Loss of one passage behind held-out text of different lengths"
        parts.append(f"{title}\n{text_table(['length', *labels], rows)}")
    return parts


def _headlines(measured: dict, scores: Scores) -> list[Headline]:
    found = []
    for length in sorted({cell["length"] for cell in measured["cells"]}):
        cells = [cell for cell in measured["cells"] if cell["length"] == length]
        right = sum(round(cell["recalled"] * cell["samples"]) for cell in cells)
        key = ("recall", "all distances", length, "recalled")
        value = f"{right} of {sum(cell['samples'] for cell in cells)}"
        found.append(Headline(f"Facts recalled, {length:,} tokens", key, value, quoted_bounds(scores.get(key), 0, "%")))
    for each in measured.get("passage", []):
        key = ("recall", PASSAGE, each["length"], "loss")
        found.append(Headline(f"Loss of a passage, {each['length']:,} tokens", key, f"{each['loss']:.3f}"))
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
        + (" One passage of the text is scored behind each length too." if measured.get("passage") else "")
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
        Option(
            "recall_together",
            "the facts of all lengths and distances in one input, which is read once: quicker, and harder",
            bool,
            default=False,
        ),
        Option(
            "recall_passage",
            "with --recall-together: also the loss of so many tokens of one passage, after each length of text",
            int,
            minimum=1,
            metavar="N",
        ),
        Option("recall_form", "JSON: what facts and questions look like", metavar="FILE", is_file=True),
    ),
    prepare=_prepare,
    reads_text=lambda settings: True,
    real_lengths=lambda settings: {"--lengths": settings.lengths},
    inputs_from=("samples", "recall_form", "recall_together", "recall_passage", "seed"),
    metrics=(Metric("recalled"), LOSS),
    means=("all distances",),
    task_names={"all distances": "", PASSAGE: "a passage"},
    tasks_are_distances=True,
    headlines=_headlines,
    tables=_tables,
    drawings=_drawings,
    explanation=_explanation,
)
