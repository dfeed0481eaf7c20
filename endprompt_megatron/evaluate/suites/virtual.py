"""The virtual-distance suite: method/virtual_probe.py asked of an engine, a request for each kind and distance."""

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.plotting import Palette, dress, legend, length_axis
from endprompt_megatron.common.text_table import text_table
from endprompt_megatron.evaluate.engines.base import Engine
from endprompt_megatron.evaluate.intervals import Series
from endprompt_megatron.evaluate.options import TEXT, Option, parse_lengths
from endprompt_megatron.evaluate.plots import of_suite, window_mark
from endprompt_megatron.evaluate.requests import Request, Response, content_of
from endprompt_megatron.evaluate.suite import LOSS, Drawing, Headline, Metric, Prepared, Scores, Subject, Suite
from endprompt_megatron.evaluate.tables import bounds_text, quoted_bounds, scores_of
from endprompt_megatron.method.virtual_probe import KINDS, default_distances, probe_inputs, summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def probe_requests(probes: dict[str, list[dict]]) -> Iterator[Request]:
    """A request for each kind and distance.  `probes`: what `probe_inputs` gave, by kind."""
    for kind, of_kind in probes.items():
        for probe in of_kind:
            tokens, positions, scored = probe["tokens"], probe["position_ids"], probe["scored"]

            def ask(
                engine: Engine, tokens: np.ndarray = tokens, positions: np.ndarray = positions, scored=scored
            ) -> dict:
                first = int(scored.any(axis=0).argmax())
                losses, correct = engine.token_losses(tokens, positions, last=scored.shape[1] - first)
                rows = [summarise(*row) for row in zip(losses, correct, scored[:, first:], strict=True)]
                return {key: [row[key] for row in rows] for key in ("loss", "accuracy")}

            notes = {"physical": tokens.shape[1], "samples": tokens.shape[0]}
            content = content_of(tokens, positions, scored)
            yield Request("virtual", kind, probe["distance"], 0, content, tokens.size, notes=notes, ask=ask)


def result(responses: list[Response]) -> dict:
    """{"physical", "samples", kind: {distance: {loss, accuracy}}}."""
    first = responses[0].notes
    found: dict = {"physical": first["physical"], "samples": first["samples"]}
    for response in responses:
        # Every row has as many scored places, so the mean of the rows' means is that of all places.
        values = {key: float(np.mean(rows)) for key, rows in response.record.items()}
        found.setdefault(response.task, {})[str(response.length)] = values
    return found


def series(responses: list[Response]) -> list[Series]:
    """Loss and accuracy of the rows, by kind and distance."""
    return [
        Series("virtual", response.task, response.length, metric, (np.asarray(response.record[metric]),))
        for response in responses
        for metric in ("loss", "accuracy")
    ]


def _prepare(subject: Subject) -> Prepared:
    s, text = subject.settings, subject.tokens
    window = subject.trained_window
    if s.physical < 16:
        raise InputError(f"--physical {s.physical}: a probe needs 16 tokens or more")
    if len(text) < s.physical:
        raise InputError(f"--physical {s.physical}: the held-out text has only {len(text)} tokens; give a longer one")
    if s.distances is None and window < s.physical:
        raise InputError(f"--physical {s.physical}: above the model's window of {window}; use a smaller one")
    distances = s.distances or default_distances(s.physical, window)
    if distances[0] < s.physical:
        raise InputError(f"--distances {distances[0]}: below the probe's {s.physical} tokens; see --physical")
    probes = {
        kind: probe_inputs(
            text,
            physical_len=s.physical,
            distances=distances,
            samples=s.probe_samples,
            seed=s.seed,
            kind=kind,
        )
        for kind in KINDS
    }
    sizes = [probe["tokens"].size for of_kind in probes.values() for probe in of_kind]
    return Prepared(lambda: probe_requests(probes), result, series, (len(sizes), sum(sizes)))


def _tables(results: dict, labels: list[str]) -> list[str]:
    measured = {label: results["measurements"][label]["virtual"] for label in labels}
    first, parts = measured[labels[0]], []
    for kind, title in (("repeat", "recalling a passage"), ("continue", "going on with the text")):
        header = ["virtual length", *(f"{label} {what}" for label in labels for what in ("loss", "right", "95%"))]
        rows = []
        for distance in first[kind]:
            row = [distance]
            for label in labels:
                entry = measured[label][kind][distance]
                score = scores_of(results, label).get(("virtual", kind, int(distance), "accuracy"))
                row += [f"{entry['loss']:.3f}", f"{entry['accuracy']:.0%}", bounds_text(score, 100, 0)]
            rows.append(row)
        parts.append(f"Virtual distance, {title} ({first['physical']} physical tokens)\n" + text_table(header, rows))
    return parts


def _headlines(measured: dict, scores: Scores) -> list[Headline]:
    furthest = max(map(int, measured["repeat"]))
    key = ("virtual", "repeat", furthest, "accuracy")
    value = f"{measured['repeat'][str(furthest)]['accuracy']:.0%}"
    return [Headline(f"Recalled at virtual length {furthest:,}", key, value, quoted_bounds(scores.get(key), 0, "%"))]


def draw(axes: "Axes", results: dict, palette: Palette, *, kind: str = "repeat", quantity: str = "loss") -> None:
    """Loss or accuracy of the virtual-distance probe against the virtual length."""
    every, physical = set(), 0
    for label, measured in of_suite(results, "virtual"):
        probe, physical = measured[kind], measured["physical"]
        distances = [int(distance) for distance in probe]
        axes.plot(distances, [entry[quantity] for entry in probe.values()], **palette.line(label))
        every |= set(distances)
    length_axis(axes, sorted(every))
    what = {"repeat": "Recalling a passage", "continue": "Going on with the text"}[kind]
    unit = {"loss": "loss, nats a token", "accuracy": "share of tokens right"}[quantity]
    dress(axes, palette, f"{what} at a virtual distance", f"virtual length, {physical} physical tokens", unit)
    window_mark(axes, results, palette)
    legend(axes, palette)


def _explanation(measured: dict) -> str:
    return (
        "A short input whose last tokens carry far position ids: to the rotary embedding a long input, to the hardware "
        "a short one. Recalling means repeating a passage from before the jump word for word; going on means plain "
        "text across it. The leftmost point has no jump."
    )


SUITE = Suite(
    name="virtual",
    title="Virtual distance",
    about="a short input whose last tokens carry far position ids, by the virtual length",
    options=(
        TEXT,
        Option("physical", "tokens of an input", int, default=512, minimum=1),
        Option("distances", "virtual lengths; by default powers of 2 up to the model's window", parse=parse_lengths),
        Option("probe_samples", "inputs for each virtual length", int, default=8, minimum=1),
    ),
    prepare=_prepare,
    reads_text=lambda settings: True,
    refused_engines={"vllm": "vLLM takes no position ids; use --engine transformers or megatron for it"},
    inputs_from=("physical", "probe_samples", "seed"),
    metrics=(Metric("accuracy"), LOSS),
    by_length=False,
    quoted_tasks=("repeat",),
    task_names={"repeat": "recalling", "continue": "going on"},
    headlines=_headlines,
    tables=_tables,
    drawings=lambda results: [
        Drawing(f"Virtual distance, {kind}", functools.partial(draw, kind=kind)) for kind in KINDS
    ],
    explanation=_explanation,
    limits=lambda measured, settings: [
        "virtual lengths reach further than real ones, but only a short input's tokens compete for attention there"
    ],
)
