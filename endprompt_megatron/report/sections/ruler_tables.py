"""RULER by length and by task, the paper's four methods below, and why the two are not the same measurement."""

from html import escape

from endprompt_megatron.evaluate.plots import short
from endprompt_megatron.evaluate.score_tables import published
from endprompt_megatron.model.published_shapes import plain_name
from endprompt_megatron.report.html import details, missing, note, section, sentence, table
from endprompt_megatron.report.models import Measured, Model
from endprompt_megatron.report.sections import cells
from endprompt_megatron.report.sections.cells import NONE

PAPER = "4096–65536"
_PAPERS_LENGTHS = (4096, 8192, 16384, 32768, 65536)
_NOTE = "not comparable to published RULER: "  # how ruler/scores.py begins its notes


def ruler(measured: Measured) -> str:
    """The section; a note where RULER was not run."""
    title = "RULER"
    models = measured.of("ruler")
    if not models:
        return section("ruler", title, missing("RULER was not run (<code>--suite ruler</code>)."))
    lengths = sorted({length for model in models for _, length in _asked(model)})
    paper = published()["ruler"]
    shown = [*lengths, *(length for length in _PAPERS_LENGTHS if length not in lengths)]
    head = [*(short(length) for length in sorted(shown)), "mean", "samples"]
    rows = []
    for model in models:
        counted = [cells.percent(model, ("ruler", "mean", length, "score")) for length in sorted(shown)]
        rows.append((cells.head(model), [*counted, _whole(model, lengths), cells.counts(_samples(model))]))
    for name, of in paper["by_length"].items():
        mean = paper["tasks"][name]["mean"]
        counted = [_published(of, length, mean) for length in sorted(shown)]
        rows.append((f'<span class="paper">{escape(name)}, published</span>', [*counted, f"{mean:.2f}", NONE]))
    caption = "Percent, mean over the tasks asked; samples are questions a task and length."
    warning = _not_the_same(models, lengths)
    parts = [note([warning]), table(head, rows, caption=caption, kind="scores"), note([_asides(measured)])]
    parts += [_by_task(model, lengths) for model in models]
    parts.append(_papers_tasks(paper["tasks"]))
    return section("ruler", title, *parts)


def _asked(model: Model) -> list[tuple[str, int]]:
    """Tasks and lengths that the model has scores of."""
    return [(task, n) for suite, task, n, _ in model.scores if suite == "ruler" and task != "mean" and n]


def _samples(model: Model) -> list[int]:
    return [model.scores["ruler", task, length, "score"]["samples"] for task, length in _asked(model)]


def _whole(model: Model, lengths: list[int]) -> str:
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


def _not_the_same(models: list[Model], lengths: list[int]) -> str:
    """In what these scores differ from RULER as the paper reports it, in one paragraph."""
    differ: dict[str, None] = {}
    others = sorted({model.origin for model in models if not _is_the_papers(model.origin)})
    if others:
        differ[f"another model ({escape(sentence(others))})"] = None
    if lengths != list(_PAPERS_LENGTHS):
        wanted = cells.lengths_text(list(_PAPERS_LENGTHS))
        differ[f"lengths of {cells.lengths_text(lengths)} tokens instead of {wanted}"] = None
    for model in models:
        for found in model.measured["ruler"].get("notes") or []:
            differ[escape(found.removeprefix(_NOTE))] = None
        named = model.settings.get("ruler_template")
        if named not in (None, "base", "chat"):
            differ[f"questions in RULER's template {escape(named)}"] = None
        elif (named or model.settings.get("template", "base")) != "base":
            differ["questions in the model's chat template"] = None
    based = f"Published: {escape(published()['model'])}."
    if not differ:
        return f"{based} These scores are of the same tasks, lengths and sources."
    return (
        f"<strong>Not the paper's RULER, so not to be compared with the published rows:</strong> here "
        f"{'; '.join(differ)}. {based}"
    )


def _is_the_papers(name: str) -> bool:
    return plain_name(name) == "llama-3-8b" and "instruct" not in name.lower()


def _asides(measured: Measured) -> str:
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
        words.append(
            "Left out: " + "; ".join(f"{escape(name)} ({escape(why)})" for name, why in left_out.items()) + "."
        )
    return " ".join([*words, *map(escape, measured.left_out("ruler"))])


def _by_task(model: Model, lengths: list[int]) -> str:
    """Every task and length of a model, folded."""
    asked = _asked(model)
    rows = []
    for task in dict.fromkeys(task for task, _ in asked):
        line = [cells.percent(model, ("ruler", task, length, "score")) for length in lengths]
        rows.append((escape(task), [*line, cells.counts(_samples_of(model, task))]))
    rows.append(("mean", [cells.percent(model, ("ruler", "mean", length, "score")) for length in lengths] + [""]))
    head = [*(short(length) for length in lengths), "samples"]
    return details(f"By task: {cells.head(model)}", table(head, rows, kind="scores"))


def _samples_of(model: Model, task: str) -> list[int]:
    return [model.scores["ruler", name, n, "score"]["samples"] for name, n in _asked(model) if name == task]


def _papers_tasks(tasks: dict) -> str:
    """The paper's means over 4K to 64K by task, folded."""
    names = list(tasks)
    rows = [(escape(task), [f"{tasks[name][task]:.2f}" for name in names]) for task in tasks[names[0]]]
    return details(f"By task: published, mean over {PAPER} tokens", table(list(map(escape, names)), rows))
