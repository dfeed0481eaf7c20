"""Perplexity on held-out text: by the length of the input, by the position inside the longest one, and sliding.

By length: the last `scored` tokens of each input.  The inputs of all lengths end at the same token, so every length
scores the very same tokens and only the amount of text before them differs.  A model that uses its context gets
better with length; one past its window collapses.
By position: every token of the longest input, in equal buckets.
Sliding: every token of the longest inputs by a model that sees `window` tokens of them at a time and moves on by
`stride`: what a model with a short window makes of a long text, to compare with one that reads it whole.
"""

import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.plotting import Palette, dress, legend, length_axis, level_axis, short
from endprompt_megatron.common.text_table import text_table
from endprompt_megatron.evaluate.engines.base import Engine
from endprompt_megatron.evaluate.held_out_text import windows
from endprompt_megatron.evaluate.intervals import Series
from endprompt_megatron.evaluate.options import TEXT, Option
from endprompt_megatron.evaluate.plots import of_suite, window_mark
from endprompt_megatron.evaluate.requests import Request, Response, content_of
from endprompt_megatron.evaluate.suite import LOSS, Drawing, Headline, Prepared, Scores, Subject, Suite
from endprompt_megatron.evaluate.tables import bounds_text, scores_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BUCKETS = 24
BLOCK = 64  # tokens of one sample of the statistics: neighbours are too much alike to count one by one
BY_LENGTH, SLIDING = "by_length", "sliding"


def requests_by_length(inputs: np.ndarray, lengths: list[int], *, scored: int = 512) -> Iterator[Request]:
    """A request for each window and length.  `inputs` int64 [windows, lengths[-1]]; `lengths` ascend, above `scored`.

    Raises InputError for lengths that are not.
    """
    longest = lengths[-1]
    if lengths[0] <= scored:
        raise InputError(
            f"--lengths {lengths[0]}: not above the {scored} tokens that are scored; use --scored N below it"
        )
    for number, row in enumerate(inputs):
        for length in lengths:
            tokens = row[None, longest - length :]
            # The whole longest input is scored, for the buckets; of shorter ones the tail alone.
            whole = length == longest

            def ask(engine: Engine, tokens: np.ndarray = tokens, whole: bool = whole) -> dict:
                losses, _ = engine.token_losses(tokens, last=None if whole else scored)
                tail = losses[0, -scored:]
                record = {"loss": _mean(tail), "blocks": block_means(tail)}
                if whole:
                    record["buckets"] = [_mean(losses[0, a:b]) for _, _, a, b in _buckets(tokens.shape[1])]
                return record

            content = content_of(tokens, scored, whole)
            yield Request("perplexity", BY_LENGTH, length, number, content, length, notes={"scored": scored}, ask=ask)


def sliding_requests(inputs: np.ndarray, window: int, stride: int) -> Iterator[Request]:
    """A request for each position of the window.  A window as long as the input reads it whole."""
    longest = inputs.shape[1]
    window = min(window, longest)
    ends = [*range(window, longest, stride), longest]
    for number, row in enumerate(inputs):
        done = 1  # the first token has no prediction
        for place, end in enumerate(ends):
            tokens, fresh = row[None, end - window : end], end - done
            done = end

            def ask(engine: Engine, tokens: np.ndarray = tokens, fresh: int = fresh) -> dict:
                losses, _ = engine.token_losses(tokens, last=fresh)
                return {"sum": float(losses.sum(dtype=np.float64)), "blocks": block_means(losses[0])}

            notes = {"window": window, "stride": stride, "tokens": fresh, "input": number}
            name = ("perplexity", SLIDING, longest, number * len(ends) + place)
            yield Request(*name, content_of(tokens, fresh), window, notes=notes, ask=ask)


def result(responses: list[Response]) -> dict:
    """Losses in nats: {"scored", "by_length": [{length, loss, stderr, perplexity, windows: [loss of each]}],
    "by_position": [{start, end, loss, stderr, perplexity}]}; the standard errors are over windows, null for one.

    Where windows slid, "sliding": {window, stride, tokens, loss, perplexity} too.
    """
    by_length: dict[int, list[dict]] = {}
    for response in responses:
        if response.task == BY_LENGTH:
            by_length.setdefault(response.length, []).append(response.record)
    found: dict = {"scored": next(response.notes["scored"] for response in responses if response.task == BY_LENGTH)}
    found["by_length"] = []
    for length, records in by_length.items():
        losses = [record["loss"] for record in records]
        found["by_length"].append(
            {"length": length, **_summary(losses), "windows": [round(loss, 6) for loss in losses]}
        )
    longest = max(by_length)
    found["by_position"] = [
        {"start": start, "end": end, **_summary([record["buckets"][place] for record in by_length[longest]])}
        for place, (start, end, _, _) in enumerate(_buckets(longest))
    ]
    slid = [(response.notes, response.record) for response in responses if response.task == SLIDING]
    if slid:
        tokens = sum(notes["tokens"] for notes, _ in slid)
        loss = sum(record["sum"] for _, record in slid) / tokens
        found["sliding"] = {
            "window": slid[0][0]["window"],
            "stride": slid[0][0]["stride"],
            "tokens": tokens,
            "loss": loss,
            "perplexity": _perplexity(loss),
        }
    return found


def series(responses: list[Response]) -> list[Series]:
    """Losses of blocks of about 64 tokens, by length and sliding."""
    blocks: dict[tuple[str, int], list[float]] = {}
    for response in responses:
        blocks.setdefault((response.task, response.length), []).extend(response.record["blocks"])
    return [
        Series("perplexity", task, length, "loss", (np.asarray(values),)) for (task, length), values in blocks.items()
    ]


def _buckets(length: int) -> list[tuple[int, int, int, int]]:
    """(start, end, first column, last column + 1): the loss at column i is that of the token at position i + 1."""
    edges = np.linspace(0, length, min(BUCKETS, length - 1) + 1).round().astype(int).tolist()
    found = [(start, end, max(start, 1) - 1, end - 1) for start, end in itertools.pairwise(edges)]
    return [bucket for bucket in found if bucket[3] > bucket[2]]


def block_means(losses: np.ndarray) -> list[float]:
    """Means of runs of about BLOCK tokens."""
    return [_mean(part) for part in np.array_split(losses, max(1, round(len(losses) / BLOCK)))]


def _mean(losses: np.ndarray) -> float:
    return float(losses.mean(dtype=np.float64))


def _summary(means: list[float]) -> dict:
    """Mean over windows, its standard error, and the perplexity of the mean."""
    loss = float(np.mean(means))
    stderr = float(np.std(means, ddof=1) / math.sqrt(len(means))) if len(means) > 1 else None
    return {"loss": loss, "stderr": stderr, "perplexity": _perplexity(loss)}


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def _prepare(subject: Subject) -> Prepared:
    s = subject.settings
    if s.lengths[0] <= s.scored:
        raise InputError(
            f"--lengths {s.lengths[0]}: should be above the {s.scored} scored tokens; "
            "use longer inputs or a smaller --scored"
        )
    inputs, window = windows(subject.tokens, s.lengths[-1], s.windows), subject.model.window
    if s.stride is not None and s.stride > min(window, s.lengths[-1]) - 1:
        raise InputError(
            f"--stride {s.stride}: should be below the window of {window} and --lengths "
            f"{s.lengths[-1]}; a half or a quarter of the window is usual"
        )

    def requests() -> Iterator[Request]:
        yield from requests_by_length(inputs, s.lengths, scored=s.scored)
        if s.stride is not None:
            yield from sliding_requests(inputs, window, s.stride)

    slid = [request.tokens for request in sliding_requests(inputs, window, s.stride)] if s.stride is not None else []
    expected = len(s.lengths) * s.windows + len(slid), sum(s.lengths) * s.windows + sum(slid)
    return Prepared(requests, result, series, expected)


def perplexity_text(value: float) -> str:
    """A collapsed model's thousands stay readable beside the others' tens."""
    return f"{value:,.{1 if value < 1000 else 0}f}" if value < 1e6 else f"{value:.1e}"


def _loss_text(entry: dict) -> str:
    """Loss with its standard error where there is one."""
    error = f" ±{entry['stderr']:.3f}" if entry.get("stderr") is not None else ""
    return f"{entry['loss']:.3f}{error}"


def _tables(results: dict, labels: list[str]) -> list[str]:
    measured = {label: results["measurements"][label]["perplexity"] for label in labels}
    header = ["length", *(f"{label} {what}" for label in labels for what in ("loss", "95%", "ppl"))]
    rows = []
    for entries in zip(*(measured[label]["by_length"] for label in labels), strict=True):
        row = [str(entries[0]["length"])]
        for label, entry in zip(labels, entries, strict=True):
            score = scores_of(results, label).get(_key(entry["length"]))
            row += [_loss_text(entry), bounds_text(score, 1, 3), perplexity_text(entry["perplexity"])]
        rows.append(row)
    title = f"Held-out text, last {measured[labels[0]]['scored']} tokens of real inputs"
    parts = [f"{title}\n{text_table(header, rows)}"]
    slid = {label: of_model.get("sliding") for label, of_model in measured.items()}
    if all(slid.values()):
        header = ["model", "window", "stride", "tokens", "loss", "ppl"]
        rows = [
            [
                label,
                *(str(entry[key]) for key in ("window", "stride", "tokens")),
                _loss_text(entry),
                perplexity_text(entry["perplexity"]),
            ]
            for label, entry in slid.items()
        ]
        parts.append(f"Held-out text, every token of the longest inputs, sliding window\n{text_table(header, rows)}")
    return parts


def _key(length: int) -> tuple[str, str, int, str]:
    return "perplexity", BY_LENGTH, length, "loss"


def _headlines(measured: dict, scores: Scores) -> list[Headline]:
    found = []
    for entry in measured["by_length"]:
        score = scores.get(_key(entry["length"]))
        bounds = (score and score["interval"]) or ()
        found.append(
            Headline(
                f"Perplexity, {entry['length']:,} tokens",
                _key(entry["length"]),
                perplexity_text(entry["perplexity"]),
                "–".join(perplexity_text(_perplexity(bound)) for bound in bounds),
            )
        )
    slid = measured.get("sliding")
    if slid:
        label = f"Perplexity of every token of the longest inputs, sliding window of {slid['window']:,} tokens"
        key = ("perplexity", "sliding", slid["window"], "loss")
        found.append(Headline(label, key, perplexity_text(slid["perplexity"])))
    return found


def draw_by_length(axes: "Axes", results: dict, palette: Palette) -> None:
    """Perplexity of the last tokens against the length of the input, with standard errors."""
    values, lengths, scored = [], [], 0
    for label, measured in of_suite(results, "perplexity"):
        entries, scored = measured["by_length"], measured["scored"]
        lengths = [entry["length"] for entry in entries]
        middle = [entry["perplexity"] for entry in entries]
        # The error is of the loss, so its bounds are not symmetric once exponentiated.
        low = [p * (1 - math.exp(-(e["stderr"] or 0))) for p, e in zip(middle, entries, strict=True)]
        high = [p * (math.exp(e["stderr"] or 0) - 1) for p, e in zip(middle, entries, strict=True)]
        axes.errorbar(lengths, middle, [low, high], capsize=2, **palette.line(label))
        values += middle
    level_axis(axes, values)
    length_axis(axes, lengths)
    dress(axes, palette, "Perplexity by length", "tokens in the input", f"last {scored} tokens")
    window_mark(axes, results, palette)
    legend(axes, palette)


def draw_by_position(axes: "Axes", results: dict, palette: Palette) -> None:
    """Perplexity along the longest input, with bands of 95% where there are several inputs."""
    from matplotlib.ticker import FuncFormatter, MultipleLocator

    values, end = [], 1
    for label, measured in of_suite(results, "perplexity"):
        buckets = measured["by_position"]
        end = buckets[-1]["end"]
        middle = [bucket["perplexity"] for bucket in buckets]
        style = palette.line(label) | {"marker": None}
        places = [(bucket["start"] + bucket["end"]) / 2 for bucket in buckets]
        axes.plot(places, middle, **style)
        if all(bucket["stderr"] is not None for bucket in buckets):
            bounds = [
                [math.exp(min(bucket["loss"] + sign * 1.96 * bucket["stderr"], 700)) for bucket in buckets]
                for sign in (-1, 1)
            ]
            axes.fill_between(places, *bounds, color=style["color"], alpha=0.15, linewidth=0)
        values += middle
    level_axis(axes, values)
    axes.set_xlim(0, end)
    step = 2 ** max(0, (end // 5).bit_length())
    axes.xaxis.set_major_locator(MultipleLocator(step))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    dress(axes, palette, "Perplexity by position", "position in the input", f"inputs of {end:,} tokens")
    window_mark(axes, results, palette)
    legend(axes, palette)


def _explanation(measured: dict) -> str:
    count = len(measured["by_length"][0]["windows"])
    inputs = f"{count} held-out {'inputs' if count > 1 else 'input'}"
    return (
        f"Perplexity of the last {measured['scored']} tokens of {inputs} of each length; "
        "all lengths score the same tokens. A model that uses its context gets better with the length; "
        "one past its window collapses."
    )


def _spread(results: dict) -> str:
    windows = [len(measured["by_length"][0]["windows"]) for _, measured in of_suite(results, "perplexity")]
    if max(windows, default=1) < 2:
        return "One input: no standard error."
    return f"Bars are standard errors over {max(windows)} inputs, bands 95% of them."


def _limits(measured: dict, settings: object) -> list[str]:
    if len(measured["by_length"][0]["windows"]) >= 5:
        return []
    return [
        "a few stretches of one held-out text say little about other texts, and differences of a few hundredths in the "
        "loss may be chance"
    ]


SUITE = Suite(
    name="perplexity",
    title="Perplexity",
    about="loss of held-out text by the length of the input and by position",
    options=(
        TEXT,
        Option("windows", "inputs of each length", int, default=2, minimum=1),
        Option("scored", "tokens scored at the end of each input", int, default=512, minimum=1),
        Option(
            "stride",
            "also slide the model's window over the longest inputs, by so many tokens",
            int,
            minimum=1,
            refused_without_suite=True,
        ),
    ),
    prepare=_prepare,
    reads_text=lambda settings: True,
    real_lengths=lambda settings: {"--lengths": settings.lengths},
    inputs_from=("lengths", "windows", "scored", "seed"),
    metrics=(LOSS,),
    quoted_tasks=(BY_LENGTH,),
    task_names={BY_LENGTH: ""},
    headlines=_headlines,
    losses_by_position=lambda measured: measured["by_position"],
    tables=_tables,
    drawings=lambda results: [
        Drawing("Perplexity by length", draw_by_length, _spread(results)),
        Drawing("Perplexity by position", draw_by_position),
    ],
    explanation=_explanation,
    limits=_limits,
)
