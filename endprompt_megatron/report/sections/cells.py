"""Scores as table cells: the number, its interval of 95%, and whether it differs from before by more than the noise."""

import math
from html import escape

from endprompt_megatron.evaluate.plots import short
from endprompt_megatron.evaluate.suites.perplexity import perplexity_text
from endprompt_megatron.report.models import Key, Model

NONE = "–"
AS_ABOVE = "Intervals and signs as under Results."
LEGEND = (
    "Small: 95% interval. ▲ better and ▼ worse than before by more than the noise, ≈ not distinguishable from it; "
    "each comparison stands alone, so of twenty that differ by chance one is marked."
)


def percent(model: Model, key: Key, digits: int = 1, *, whole: bool = True) -> str:
    """A score in percent; one over less than its name says (not `whole`) has a star."""
    score = model.scores.get(key)
    if score is None:
        return NONE
    value = f"{100 * score['score']:.{digits}f}"
    return f"{value}{'' if whole else '*'}{mark(model, key)}{bounds(score, 100, digits)}"


def perplexity(model: Model, entry: dict) -> str:
    """Perplexity of an entry of `by_length`, its interval made from the loss's."""
    key = ("perplexity", "by_length", entry["length"], "loss")
    score = model.scores.get(key)
    between = ""
    if score and score["interval"]:
        low, high = (perplexity_text(math.exp(min(bound, 700))) for bound in score["interval"])
        between = f"<small>{low}–{high}</small>"
    value = f'<span title="loss {entry["loss"]:.3f}">{perplexity_text(entry["perplexity"])}</span>'
    return f"{value}{mark(model, key)}{between}"


def bounds(score: dict, scale: float, digits: int) -> str:
    """The interval, small."""
    if not score.get("interval"):
        return ""
    low, high = (f"{scale * bound:.{digits}f}" for bound in score["interval"])
    return f"<small>{low}–{high}</small>"


def mark(model: Model, key: Key) -> str:
    """Better, worse or neither than the baseline; nothing where they were not compared."""
    compared = model.against.get(key)
    return "" if compared is None else f" {verdict(compared)}"


def verdict(compared: dict) -> str:
    """The sign of a comparison, with words for those who cannot see it."""
    if not compared["beyond_noise"]:
        return '<span class="mark" title="not distinguishable from noise">≈</span>'
    better = (compared["difference"] < 0) == (compared["metric"] == "loss")
    sign, word = ("▲", "better") if better else ("▼", "worse")
    return f'<span class="mark {word}" title="{word} by more than the noise">{sign}</span>'


def change(compared: dict) -> str:
    """A difference with its interval: percentage points, or nats."""
    scale, digits = (1, 3) if compared["metric"] == "loss" else (100, 1)
    value = f"{scale * compared['difference']:+.{digits}f} {verdict(compared)}"
    if compared["interval"]:
        low, high = (f"{scale * bound:+.{digits}f}" for bound in compared["interval"])
        value += f"<small>{low} to {high}</small>"
    return value


def counts(values: list[int]) -> str:
    """How many samples: one number, or the least and the most."""
    if not values:
        return NONE
    return f"{min(values):,}" if min(values) == max(values) else f"{min(values):,}–{max(values):,}"


def head(model: Model) -> str:
    """A model's name at the top of its column."""
    return escape(model.name)


def lengths_text(lengths: list[int]) -> str:
    """4K, 8K and 16K."""
    from endprompt_megatron.report.html import sentence

    return sentence([short(length) for length in lengths])
