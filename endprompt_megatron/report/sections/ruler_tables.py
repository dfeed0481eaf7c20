"""RULER by length and by task, the paper's four methods below, and why the two are not the same measurement."""

from endprompt_megatron.common.html_page import (
    Cell,
    Details,
    Paragraph,
    Row,
    Section,
    Table,
    enumerate_words,
    missing,
    note,
)
from endprompt_megatron.evaluate.plots import short
from endprompt_megatron.evaluate.score_tables import published
from endprompt_megatron.model.published_shapes import plain_name
from endprompt_megatron.report.models import Measured, Model
from endprompt_megatron.report.sections import cells
from endprompt_megatron.report.sections.cells import NONE

PAPER = "4096–65536"
_PAPERS_LENGTHS = (4096, 8192, 16384, 32768, 65536)
_NOTE = "not comparable to published RULER: "  # how ruler/scores.py begins its notes


def ruler(measured: Measured) -> Section:
    """The section; a note where RULER was not run."""
    title, models = "RULER", measured.of("ruler")
    if not models:
        return Section("ruler", title, [missing("RULER was not run (`--suite ruler`).")])
    lengths = sorted({length for model in models for _, length in _asked(model)})
    paper = published()["ruler"]
    shown = sorted({*lengths, *_PAPERS_LENGTHS})
    rows = []
    for model in models:
        scores = [cells.percent(model, ("ruler", "mean", length, "score")) for length in shown]
        rows.append(Row(model.name, [*scores, _overall(model, lengths), cells.counts(_samples(model))]))
    for name, of in paper["by_length"].items():
        mean = paper["tasks"][name]["mean"]
        scores = [_published(of, length, mean) for length in shown]
        rows.append(Row(f"{name}, published", [*scores, f"{mean:.2f}", NONE], kind="paper"))
    head = [*map(short, shown), "mean", "samples"]
    caption = "Percent, mean over the tasks asked; samples are questions a task and length."
    by_task = [_by_task(model, lengths) for model in models]
    warning, table = note([_differences(models, lengths)]), Table(head, rows, caption, kind="scores")
    return Section("ruler", title, [*warning, table, *_asides(measured), *by_task, _papers_tasks(paper["tasks"])])


def _asked(model: Model) -> list[tuple[str, int]]:
    """Tasks and lengths that the model has scores of."""
    return [(task, n) for suite, task, n, _ in model.scores if suite == "ruler" and task != "mean" and n]


def _samples(model: Model) -> list[int]:
    return [model.scores["ruler", task, length, "score"]["samples"] for task, length in _asked(model)]


def _overall(model: Model, lengths: list[int]) -> Cell:
    """The mean over all lengths; one alone is its own."""
    if len(lengths) == 1:
        return cells.percent(model, ("ruler", "mean", lengths[0], "score"))
    return cells.percent(model, ("ruler", "mean", 0, "score"))


def _published(of: dict, length: int, mean: float) -> str:
    if str(length) in of:
        return f"{of[str(length)]:.2f}"
    if length != 65536:
        return NONE
    # The paper gives the mean over five lengths and four of them; the fifth follows.
    return f"{len(_PAPERS_LENGTHS) * mean - sum(of.values()):.2f} †"


def _differences(models: list[Model], lengths: list[int]) -> str:
    """In what these scores differ from RULER as the paper reports it, in one paragraph."""
    differ: dict[str, None] = {}
    others = sorted({model.origin for model in models if not _is_the_papers(model.origin)})
    if others:
        differ[f"another model ({enumerate_words(others)})"] = None
    if lengths != list(_PAPERS_LENGTHS):
        wanted = cells.lengths_text(list(_PAPERS_LENGTHS))
        differ[f"lengths of {cells.lengths_text(lengths)} tokens instead of {wanted}"] = None
    for model in models:
        for found in model.measured["ruler"].get("notes") or []:
            differ[found.removeprefix(_NOTE)] = None
        if model.settings.get("template", "base") != "base":
            differ["questions in the model's chat template"] = None
    based = f"Published: {published()['model']}."
    if not differ:
        return f"{based} These scores are of the same tasks, lengths and sources."
    return (
        f"**Not the paper's RULER, so not to be compared with the published rows:** here {'; '.join(differ)}. {based}"
    )


def _is_the_papers(name: str) -> bool:
    return plain_name(name) == "llama-3-8b" and "instruct" not in name.lower()


def _asides(measured: Measured) -> list[Paragraph]:
    words = [
        "† follows from the paper's mean over 4K to 64K and its four other lengths; it prints no row for 64K.",
        cells.AS_ABOVE,
    ]
    left_out = {
        name: reason
        for model in measured.of("ruler")
        for name, reason in (model.measured["ruler"].get("left_out") or {}).items()
        if reason != "not asked"
    }
    if left_out:
        words.append("Left out: " + "; ".join(f"{name} ({why})" for name, why in left_out.items()) + ".")
    return note([*words, *measured.left_out("ruler")])


def _by_task(model: Model, lengths: list[int]) -> Details:
    """Every task and length of a model, folded."""
    rows = []
    for task in [*dict.fromkeys(task for task, _ in _asked(model)), "mean"]:
        scores = [cells.percent(model, ("ruler", task, length, "score")) for length in lengths]
        rows.append(Row(task, [*scores, cells.counts(_samples_of(model, task)) if task != "mean" else ""]))
    head = [*map(short, lengths), "samples"]
    return Details(f"By task: {model.name}", [Table(head, rows, kind="scores")])


def _samples_of(model: Model, task: str) -> list[int]:
    return [model.scores["ruler", name, n, "score"]["samples"] for name, n in _asked(model) if name == task]


def _papers_tasks(tasks: dict) -> Details:
    """The paper's means over 4K to 64K by task, folded."""
    names = list(tasks)
    rows = [Row(task, [f"{tasks[name][task]:.2f}" for name in names]) for task in tasks[names[0]]]
    return Details(f"By task: published, mean over {PAPER} tokens", [Table(names, rows)])
