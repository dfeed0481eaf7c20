"""Scores as table cells: the number, its interval of 95%, and whether it differs from before by more than the noise."""

from endprompt_megatron.common.html_page import Cell
from endprompt_megatron.evaluate.registry import SUITES, Headline, Key
from endprompt_megatron.report.models import Model

NONE = "–"
AS_ABOVE = "Intervals and signs as under Results."
LEGEND = (
    "Small print: 95% interval. ▲ better and ▼ worse than before by more than the noise, ≈ not distinguishable from "
    "it. Each comparison stands alone: of twenty that differ by chance alone, about one is marked."
)
INCOMPLETE = "* Over fewer tasks or questions than its name says."


def score(model: Model, key: Key) -> Cell:
    """A score in its metric's unit; one over less than its name says has a star."""
    suite, task, _, metric_name = key
    found = model.scores.get(key)
    if found is None:
        return Cell(NONE)
    metric = SUITES[suite].metric(metric_name)
    value = f"{metric.scale * found['score']:.{metric.digits}f}"
    if task in SUITES[suite].incomplete_tasks(model.measured[suite]):
        value += "*"
    between = "–".join(f"{metric.scale * bound:.{metric.digits}f}" for bound in found.get("interval") or [])
    return Cell(value, sign(model, key), between)


def headline(model: Model, quoted: Headline) -> Cell:
    """A number that a suite quotes, as it words it."""
    value = quoted.value if quoted.complete else f"{quoted.value}*"
    found = model.scores.get(quoted.key)
    title = f"loss {found['score']:.3f}" if found and quoted.key[3] == "loss" else ""
    return Cell(value, sign(model, quoted.key), quoted.interval, title)


def sign(model: Model, key: Key) -> str:
    """The verdict against the baseline; empty where they were not compared."""
    compared = model.against.get(key)
    return "" if compared is None else verdict(compared)


def verdict(compared: dict) -> str:
    """better, worse or same."""
    if not compared["beyond_noise"]:
        return "same"
    lower_is_better = SUITES[compared["suite"]].metric(compared["metric"]).lower_is_better
    return "better" if (compared["difference"] < 0) == lower_is_better else "worse"


def change(compared: dict) -> Cell:
    """A difference with its interval: percentage points, or the unit of the metric."""
    metric = SUITES[compared["suite"]].metric(compared["metric"])
    between = " to ".join(f"{metric.scale * bound:+.{metric.digits}f}" for bound in compared["interval"] or [])
    return Cell(f"{metric.scale * compared['difference']:+.{metric.digits}f}", verdict(compared), between)


def counts(values: list[int]) -> str:
    """How many samples: one number, or the fewest and the most."""
    if not values:
        return NONE
    return f"{min(values):,}" if min(values) == max(values) else f"{min(values):,}–{max(values):,}"
