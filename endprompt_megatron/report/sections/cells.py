"""Scores as table cells: the number, its interval of 95%, and whether it differs from before by more than the noise."""

import math

from endprompt_megatron.common.html_page import Cell, enumerate_words
from endprompt_megatron.evaluate.plots import short
from endprompt_megatron.evaluate.tables import perplexity_text
from endprompt_megatron.report.models import Key, Model

NONE = "–"
AS_ABOVE = "Intervals and signs as under Results."
LEGEND = (
    "Small print: 95% interval. ▲ better and ▼ worse than before by more than the noise, ≈ not distinguishable from "
    "it. Each comparison stands alone: of twenty that differ by chance alone, about one is marked."
)


def percent(model: Model, key: Key, digits: int = 1, *, complete: bool = True) -> Cell:
    """A score in percent; one over fewer tasks or questions than its name says (not `complete`) has a star."""
    score = model.scores.get(key)
    if score is None:
        return Cell(NONE)
    value = f"{100 * score['score']:.{digits}f}"
    return Cell(f"{value}{'' if complete else '*'}", sign(model, key), bounds(score, 100, digits))


def perplexity(model: Model, entry: dict) -> Cell:
    """Perplexity of an entry of `by_length`, its interval made from the loss's."""
    key = ("perplexity", "by_length", entry["length"], "loss")
    score = model.scores.get(key)
    between = ""
    if score and score["interval"]:
        between = "–".join(perplexity_text(math.exp(min(bound, 700))) for bound in score["interval"])
    return Cell(perplexity_text(entry["perplexity"]), sign(model, key), between, f"loss {entry['loss']:.3f}")


def counted(model: Model, key: Key, text: str) -> Cell:
    """A text for a score that is told otherwise than in percent, with the score's sign and interval."""
    score = model.scores.get(key)
    between = bounds(score, 100, 0) if score else ""
    return Cell(text, sign(model, key), f"{between}%" if between else "")


def bounds(score: dict, scale: float, digits: int) -> str:
    """The interval as text; empty where a lone sample has none."""
    return "–".join(f"{scale * bound:.{digits}f}" for bound in score.get("interval") or [])


def sign(model: Model, key: Key) -> str:
    """The verdict against the baseline; empty where they were not compared."""
    compared = model.against.get(key)
    return "" if compared is None else verdict(compared)


def verdict(compared: dict) -> str:
    """better, worse or same."""
    if not compared["beyond_noise"]:
        return "same"
    return "better" if (compared["difference"] < 0) == (compared["metric"] == "loss") else "worse"


def change(compared: dict) -> Cell:
    """A difference with its interval: percentage points, or nats."""
    scale, digits = (1, 3) if compared["metric"] == "loss" else (100, 1)
    between = " to ".join(f"{scale * bound:+.{digits}f}" for bound in compared["interval"] or [])
    return Cell(f"{scale * compared['difference']:+.{digits}f}", verdict(compared), between)


def counts(values: list[int]) -> str:
    """How many samples: one number, or the fewest and the most."""
    if not values:
        return NONE
    return f"{min(values):,}" if min(values) == max(values) else f"{min(values):,}–{max(values):,}"


def lengths_text(lengths: list[int]) -> str:
    """4K, 8K and 16K."""
    return enumerate_words([short(length) for length in lengths])


def published_column(name: str) -> Cell:
    """A method of the paper at the top of its column."""
    return Cell(name, small="published")
