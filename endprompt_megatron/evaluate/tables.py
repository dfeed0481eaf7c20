"""Evaluation results as plain text tables for a terminal, the models side by side."""

from endprompt_megatron.evaluate.score_tables import (
    bounds_text,
    differences,
    lookup,
    of_questions,
    scores_by_key,
    table,
)
from endprompt_megatron.evaluate.settings import BASELINE, EXTENDED


def labels(results: dict) -> list[str]:
    """The models that were measured, the baseline first."""
    return [label for label in (BASELINE, EXTENDED) if label in results["measurements"]]


def loss_text(entry: dict) -> str:
    """Loss with its standard error where there is one."""
    error = f" ±{entry['stderr']:.3f}" if entry.get("stderr") is not None else ""
    return f"{entry['loss']:.3f}{error}"


def perplexity_text(value: float) -> str:
    """A collapsed model's thousands stay readable beside the others' tens."""
    return f"{value:,.{1 if value < 1000 else 0}f}" if value < 1e6 else f"{value:.1e}"


def terminal(results: dict) -> str:
    """Every measurement in `results` as a titled table, with intervals of 95%."""
    names = labels(results)
    first = results["measurements"][names[0]]
    parts = []
    for suite, tables in (("perplexity", _perplexity), ("needle", _needle), ("recall", _recall), ("virtual", _virtual)):
        if suite in first:
            parts += tables(results, names)
    for suite in ("ruler", "longbench", "short"):
        if suite in first:
            parts += of_questions(results, suite, names)
    parts += differences(results)
    parts += ["\n".join(f"Left out: {what}. {reason}" for what, reason in results.get("left_out", {}).items())]
    return "\n\n".join(filter(None, parts))


def _perplexity(results: dict, names: list[str]) -> list[str]:
    measured, scores = results["measurements"], scores_by_key(results)
    first = measured[names[0]]["perplexity"]
    header = ["length", *(f"{name} {what}" for name in names for what in ("loss", "95%", "ppl"))]
    rows = []
    for entries in zip(*(measured[name]["perplexity"]["by_length"] for name in names), strict=True):
        row = [str(entries[0]["length"])]
        for name, entry in zip(names, entries, strict=True):
            interval = bounds_text(lookup(scores, name, "perplexity", "by_length", entry["length"], "loss"), 1, 3)
            row += [loss_text(entry), interval, _perplexity_of(entry)]
        rows.append(row)
    title = f"Held-out text, last {first['scored']} tokens of real inputs"
    parts = [f"{title}\n{table(header, rows)}"]
    slid = {name: measured[name]["perplexity"].get("sliding") for name in names}
    if all(slid.values()):
        header = ["model", "window", "stride", "tokens", "loss", "ppl"]
        rows = [
            [
                name,
                *(str(entry[key]) for key in ("window", "stride", "tokens")),
                loss_text(entry),
                _perplexity_of(entry),
            ]
            for name, entry in slid.items()
        ]
        parts.append(f"Held-out text, every token of the longest inputs, sliding window\n{table(header, rows)}")
    return parts


def _needle(results: dict, names: list[str]) -> list[str]:
    measured, scores = results["measurements"], scores_by_key(results)
    header = [
        "length",
        "depth",
        *(f"{name} {what}" for name in names for what in ("found", "95%", "recall", "logprob")),
    ]
    rows = []
    for cells in zip(*(measured[name]["needle"]["cells"] for name in names), strict=True):
        row = [str(cells[0]["length"]), f"{cells[0]['depth']:.0%}"]
        for name, cell in zip(names, cells, strict=True):
            score = lookup(scores, name, "needle", f"depth {cell['depth']:g}", cell["length"], "accuracy")
            found = f"{round(cell['accuracy'] * cell['samples'])} of {cell['samples']}"
            row += [found, bounds_text(score, 100, 0), f"{cell['recall']:.0%}", f"{cell['logprob']:.2f}"]
        rows.append(row)
    return ["Passkey retrieval at real input lengths\n" + table(header, rows)]


def _recall(results: dict, names: list[str]) -> list[str]:
    measured, scores = results["measurements"], scores_by_key(results)
    header = ["length", "distance", *(f"{name} {what}" for name in names for what in ("recalled", "95%", "loss"))]
    rows = []
    for cells in zip(*(measured[name]["recall"]["cells"] for name in names), strict=True):
        row = [str(cells[0]["length"]), str(cells[0]["distance"])]
        for name, cell in zip(names, cells, strict=True):
            score = lookup(scores, name, "recall", str(cell["distance"]), cell["length"], "recalled")
            found = f"{round(cell['recalled'] * cell['samples'])} of {cell['samples']}"
            row += [found, bounds_text(score, 100, 0), f"{cell['loss']:.3f}"]
        rows.append(row)
    return ["Facts recalled from held-out text, by distance\n" + table(header, rows)]


def _virtual(results: dict, names: list[str]) -> list[str]:
    measured, scores = results["measurements"], scores_by_key(results)
    parts = []
    for kind, title in (("repeat", "recalling a passage"), ("continue", "going on with the text")):
        header = ["virtual length", *(f"{name} {what}" for name in names for what in ("loss", "right", "95%"))]
        rows = []
        for distance in measured[names[0]]["virtual"][kind]:
            row = [distance]
            for name in names:
                entry = measured[name]["virtual"][kind][distance]
                score = lookup(scores, name, "virtual", kind, int(distance), "accuracy")
                row += [f"{entry['loss']:.3f}", f"{entry['accuracy']:.0%}", bounds_text(score, 100, 0)]
            rows.append(row)
        physical = measured[names[0]]["virtual"]["physical"]
        parts.append(f"Virtual distance, {title} ({physical} physical tokens)\n" + table(header, rows))
    return parts


def _perplexity_of(entry: dict) -> str:
    return perplexity_text(entry["perplexity"])
