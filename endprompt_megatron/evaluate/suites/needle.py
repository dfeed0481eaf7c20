"""Passkey retrieval at real input lengths: five digits hidden in long filler, asked for at the end.

Two scores for each length and depth, over several prompts:
  accuracy  the first run of digits in the greedy answer is the key, to the last digit;
  recall    every token of the key is the most likely one given the true tokens before it.  A small model that
            answers in a roundabout way ("is the pass key ...") still shows here whether it reads the key.
The mean log probability of the key's tokens tells degrees apart where both are 0 or 1.
"""

import functools
import itertools
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.plotting import Palette, dress, short
from endprompt_megatron.common.text_table import text_table
from endprompt_megatron.evaluate.engines.base import Engine
from endprompt_megatron.evaluate.intervals import Series
from endprompt_megatron.evaluate.options import SAMPLES, TEXT, Option, parse_lengths, parse_shares
from endprompt_megatron.evaluate.plots import of_suite
from endprompt_megatron.evaluate.requests import Request, Response, content_of
from endprompt_megatron.evaluate.suite import Drawing, Grid, Headline, Metric, Prepared, Scores, Shade, Subject, Suite
from endprompt_megatron.evaluate.tables import bounds_text, quoted_bounds, scores_of
from endprompt_megatron.tokenizer import Tokenizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n"
)
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is"
DEPTHS = (0.1, 0.5, 0.9)
ANSWER_TOKENS = 12  # room for a space, five digits and a few words around them


def passkey_requests(
    tokenizer: Tokenizer,
    lengths: list[int],
    *,
    depths: list[float] = list(DEPTHS),  # noqa: B006  (never changed)
    samples: int = 1,
    seed: int = 0,
    filler: np.ndarray | None = None,
) -> Iterator[Request]:
    """`samples` prompts a cell.  `filler` int64 [n]: held-out text; None: repeated noise.

    Prompt and answer together are `length` tokens; the same seed asks the same.  Raises InputError for a length that
    is too short, or longer than the filler.
    """
    for length, depth, sample in itertools.product(lengths, depths, range(samples)):
        # Keyed by place, not drawn in order: a cell stays the same when the grid changes.
        rng = np.random.default_rng([seed, length, round(depth * 10000), sample])
        key = str(rng.integers(10000, 100000))
        prompt = build_prompt(tokenizer, key, length - ANSWER_TOKENS, depth, filler, rng)
        expected = expected_answer(tokenizer, key)

        def ask(engine: Engine, key: str = key, prompt: list[int] = prompt, expected: list[int] = expected) -> dict:
            return _ask(engine, tokenizer, key, prompt, expected)

        notes = {"depth": depth, "filler": "noise" if filler is None else "text"}
        content = content_of(prompt, expected, ANSWER_TOKENS)
        yield Request("needle", f"{depth:g}", length, sample, content, length, notes=notes, ask=ask)


def result(responses: list[Response]) -> dict:
    """{"filler", "cells": [{length, depth, samples, accuracy, recall, logprob, answers: [{key, answer, correct,
    recalled, logprob, ranks}]}]}."""
    cells: dict[tuple[int, float], list[dict]] = {}
    for response in responses:
        cells.setdefault((response.length, response.notes["depth"]), []).append(response.record)
    return {
        "filler": responses[0].notes["filler"],
        "cells": [
            {
                "length": length,
                "depth": depth,
                "samples": len(answers),
                "accuracy": float(np.mean([answer["correct"] for answer in answers])),
                "recall": float(np.mean([answer["recalled"] for answer in answers])),
                "logprob": float(np.mean([answer["logprob"] for answer in answers])),
                "answers": answers,
            }
            for (length, depth), answers in cells.items()
        ],
    }


def series(responses: list[Response]) -> list[Series]:
    """Accuracy and recall of every cell, and of every length over its depths."""
    values: dict[tuple[str, int, str], list[float]] = {}
    for response in responses:
        for metric, value in (("accuracy", response.record["correct"]), ("recall", response.record["recalled"])):
            for task in (f"depth {response.task}", "all depths"):
                values.setdefault((task, response.length, metric), []).append(float(value))
    return [
        Series("needle", task, length, metric, (np.asarray(found),)) for (task, length, metric), found in values.items()
    ]


def _ask(engine: Engine, tokenizer: Tokenizer, key: str, prompt: list[int], expected: list[int]) -> dict:
    answer = engine.answer(prompt, expected, ANSWER_TOKENS)
    text = tokenizer.decode(answer.generated)
    found = re.search(r"\d+", text)
    # A separate token for the space before the key says nothing about memory.
    of_key = [place for place, token in enumerate(expected) if any(c.isdigit() for c in tokenizer.decode([token]))]
    return {
        "key": key,
        "answer": text,
        "correct": bool(found and found.group() == key),
        "recalled": bool((answer.ranks[of_key] == 0).all()),
        "logprob": float(answer.logprobs[of_key].mean()),
        "ranks": [int(rank) for rank in answer.ranks[of_key]],
    }


def expected_answer(tokenizer: Tokenizer, key: str) -> list[int]:
    """The ids that follow QUESTION in the right answer."""
    return continuation(tokenizer, QUESTION, f" {key}")


def continuation(tokenizer: Tokenizer, before: str, after: str) -> list[int]:
    """The ids of `after` where it goes on from `before`."""
    asked = tokenizer.encode(before)
    answered = tokenizer.encode(before + after)
    # Tokenised together, because SentencePiece marks a word's start differently at the start of a text.
    return answered[len(asked) :] if answered[: len(asked)] == asked else tokenizer.encode(after)


def build_prompt(
    tokenizer: Tokenizer,
    key: str,
    length: int,
    depth: float,
    filler: np.ndarray | None,
    rng: np.random.Generator,
) -> list[int]:
    """Task, filler with the key's sentence at `depth` of it, question: exactly `length` ids.  Raises InputError."""
    task, hidden = tokenizer.encode(TASK), tokenizer.encode(NEEDLE.format(key=key))
    question = tokenizer.encode(QUESTION)
    room = length - len(task) - len(hidden) - len(question)
    if room < 1:
        min_length = length - room + ANSWER_TOKENS + 1
        raise InputError(
            f"--lengths {length + ANSWER_TOKENS}: too short for a passkey prompt; use {min_length} or more"
        )
    if filler is None:
        unit = np.asarray(tokenizer.encode(NOISE), dtype=np.int64)
        start, stream = 0, np.tile(unit, room // len(unit) + 1)
        place = round(room * depth / len(unit)) * len(unit)  # between two rounds of the noise, not inside a word
    else:
        if len(filler) < room:
            raise InputError(f"--lengths {length + ANSWER_TOKENS}: the held-out text has only {len(filler)} tokens")
        start, stream = int(rng.integers(0, len(filler) - room + 1)), filler
        place = round(room * depth)
    hay = stream[start : start + room].tolist()
    place = min(place, room)
    return task + hay[:place] + hidden + hay[place:] + question


def _lengths(settings: Any) -> list[int]:
    return settings.needle_lengths or settings.lengths


def _prepare(subject: Subject) -> Prepared:
    s, tokenizer = subject.settings, subject.tokenizer
    filler = subject.tokens if s.filler == "text" else None
    for length in _lengths(s):  # whether a prompt fits
        build_prompt(tokenizer, "12345", length - ANSWER_TOKENS, 0.5, filler, np.random.default_rng(0))

    def requests() -> Iterator[Request]:
        return passkey_requests(tokenizer, _lengths(s), depths=s.depths, samples=s.samples, seed=s.seed, filler=filler)

    cells = len(s.depths) * s.samples
    return Prepared(requests, result, series, (len(_lengths(s)) * cells, sum(_lengths(s)) * cells))


def _tables(results: dict, labels: list[str]) -> list[str]:
    measured = [results["measurements"][label]["needle"]["cells"] for label in labels]
    columns = ("found", "95%", "recall", "logprob")
    header = ["length", "depth", *(f"{label} {what}" for label in labels for what in columns)]
    rows = []
    for cells in zip(*measured, strict=True):
        row = [str(cells[0]["length"]), f"{cells[0]['depth']:.0%}"]
        for label, cell in zip(labels, cells, strict=True):
            key = ("needle", f"depth {cell['depth']:g}", cell["length"], "accuracy")
            found = f"{round(cell['accuracy'] * cell['samples'])} of {cell['samples']}"
            bounds = bounds_text(scores_of(results, label).get(key), 100, 0)
            row += [found, bounds, f"{cell['recall']:.0%}", f"{cell['logprob']:.2f}"]
        rows.append(row)
    return ["Passkey retrieval at real input lengths\n" + text_table(header, rows)]


def _headlines(measured: dict, scores: Scores) -> list[Headline]:
    found = []
    for length in sorted({cell["length"] for cell in measured["cells"]}):
        cells = [cell for cell in measured["cells"] if cell["length"] == length]
        right = sum(round(cell["accuracy"] * cell["samples"]) for cell in cells)
        key = ("needle", "all depths", length, "accuracy")
        value = f"{right} of {sum(cell['samples'] for cell in cells)}"
        found.append(Headline(f"Passkeys found, {length:,} tokens", key, value, quoted_bounds(scores.get(key), 0, "%")))
    return found


def draw_heat_map(axes: "Axes", cells: list[dict], title: str, palette: Palette) -> None:
    """Heat map of passkey accuracy: lengths across, depths down."""
    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    grid = np.full((len(depths), len(lengths)), np.nan)
    for cell in cells:
        grid[depths.index(cell["depth"]), lengths.index(cell["length"])] = cell["accuracy"]
    axes.imshow(grid, cmap="Blues", vmin=0, vmax=1.25, aspect="auto")
    for (row, column), value in np.ndenumerate(grid):
        colour = "white" if value > 0.6 else palette.ink
        axes.text(column, row, f"{value:.0%}", ha="center", va="center", color=colour, fontsize=9)
    axes.set_xticks(range(len(lengths)), [short(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    dress(axes, palette, title, "tokens in the input", "depth of the key")
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)


def _draw(axes: "Axes", results: dict, palette: Palette, *, label: str) -> None:
    cells = results["measurements"][label]["needle"]["cells"]
    draw_heat_map(axes, cells, f"Passkey, {palette.line(label)['label']}", palette)


def _grid(measured: dict) -> Grid:
    """Lengths across, depths down; small, the mean log probability of the passkey's tokens."""
    cells = measured["cells"]
    lengths = sorted({cell["length"] for cell in cells})
    at = {(cell["length"], cell["depth"]): cell for cell in cells}
    rows = tuple(
        (f"{depth:.0%}", tuple(_shade(at.get((length, depth))) for length in lengths))
        for depth in sorted({cell["depth"] for cell in cells})
    )
    return Grid("depth", tuple(map(short, lengths)), rows, "found")


def _shade(cell: dict | None) -> Shade | None:
    if cell is None:
        return None
    hint = f"{round(cell['accuracy'] * cell['samples'])} of {cell['samples']}, log probability {cell['logprob']:.2f}"
    return Shade(cell["accuracy"], f"{cell['accuracy']:.0%}", f"{cell['logprob']:.2f}", hint)


def _explanation(measured: dict) -> str:
    filler = {"noise": "repeated noise sentences", "text": "held-out text"}[measured["filler"]]
    samples = measured["cells"][0]["samples"]
    return (
        f"Five digits hidden in {filler}, asked for at the end of a real input: {samples} "
        f"{'prompts' if samples > 1 else 'prompt'} for each length and depth. The accuracy is the share of greedy "
        "answers with the exact digits; in small print stands the mean log probability of the passkey's tokens."
    )


def _limits(measured: dict, settings: Any) -> list[str]:
    most = max(cell["samples"] for cell in measured["cells"])
    if most >= 20:
        return []
    return [f"{most} {'prompts' if most > 1 else 'prompt'} for each length and depth give only a rough accuracy"]


SUITE = Suite(
    name="needle",
    title="Passkey",
    about="five digits hidden in noise or text, by the length of the input and their depth in it",
    options=(
        TEXT,
        SAMPLES,
        Option("depths", "where the passkey stands, as shares of the filler", parse=parse_shares, default=DEPTHS),
        Option(
            "needle_lengths",
            "lengths of these inputs, if not --lengths",
            parse=parse_lengths,
            metavar="LENGTHS",
        ),
        Option("filler", "what the passkey hides in: noise or --text", choices=("noise", "text"), default="noise"),
    ),
    prepare=_prepare,
    reads_text=lambda settings: settings.filler == "text",
    real_lengths=lambda settings: (
        {"--needle-lengths": settings.needle_lengths} if settings.needle_lengths else {"--lengths": settings.lengths}
    ),
    inputs_from=("samples", "filler", "seed"),
    metrics=(Metric("accuracy"), Metric("recall")),
    means=("all depths",),
    task_names={"all depths": ""},
    headlines=_headlines,
    tables=_tables,
    drawings=lambda results: [
        Drawing(f"Passkey, {label}", functools.partial(_draw, label=label)) for label, _ in of_suite(results, "needle")
    ],
    grid=_grid,
    explanation=_explanation,
    limits=_limits,
)
