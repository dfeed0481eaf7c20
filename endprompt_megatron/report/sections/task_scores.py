"""LongBench by group and short text by task, before and after, with the paper's rows beside."""

from endprompt_megatron.common.html_page import Cell, Details, Row, Section, Table, missing, note
from endprompt_megatron.evaluate.score_tables import published
from endprompt_megatron.report.models import Measured, Model
from endprompt_megatron.report.sections import cells
from endprompt_megatron.report.sections.cells import NONE

_GROUPS = {
    "single_doc_qa": "one document",
    "multi_doc_qa": "several documents",
    "summarization": "summaries",
    "few_shot": "few-shot",
    "synthetic": "synthetic",
    "code": "code",
    "mean_16": "mean of 16 tasks",
    "mean_21": "mean of 21 tasks",
}


def longbench(measured: Measured) -> Section:
    """Groups and means, the tasks folded."""
    title, models = "LongBench", measured.of("longbench")
    if not models:
        return Section("longbench", title, [missing("LongBench was not run (`--suite longbench`).")])
    paper = published()["longbench"]["groups"]
    rows = []
    for key, name in _GROUPS.items():
        ours = [cells.percent(m, ("longbench", key, 0, "score"), complete=_complete(m, key)) for m in models]
        rows.append(Row(name, [*ours, *(f"{of[key]:.2f}" if key in of else NONE for of in paper.values())]))
    tasks = list(dict.fromkeys(task for model in models for task in model.measured["longbench"].get("tasks", {})))
    by_task = [
        Row(task, [*(cells.percent(m, ("longbench", task, 0, "score")) for m in models), _questions(models, task)])
        for task in tasks
    ]
    names = [model.name for model in models]
    table = Table(
        [*names, *map(cells.published_column, paper)],
        rows,
        "Percent. Groups and the first mean are without Chinese tasks.",
        [*(model.key for model in models), *["paper"] * len(paper)],
    )
    folded = Details("By task", [Table([*names, "questions"], by_task)])
    asides = note([cells.AS_ABOVE, *measured.left_out("longbench")])
    return Section("longbench", title, [*note(_longbench_limits(models)), table, *asides, folded])


def _mean(model: Model, key: str) -> dict:
    found = model.measured["longbench"]
    return found.get(key) or (found.get("groups", {}).get(key) or {}).get("not_chinese") or {}


def _complete(model: Model, key: str) -> bool:
    return bool(_mean(model, key).get("complete"))


def _questions(models: list[Model], task: str) -> str:
    """Questions of a task, of how many there are."""
    rows = [model.measured["longbench"]["tasks"].get(task) for model in models]
    row = next((row for row in rows if row), None)
    return f"{row['questions']} of {row['published_questions']}" if row else NONE


def _longbench_limits(models: list[Model]) -> list[str]:
    """What keeps these scores from being LongBench's."""
    found = []
    lacking = {name for model in models for name in model.measured["longbench"].get("missing") or []}
    short = {name for model in models for name in _mean(model, "mean_21").get("short") or []}
    prompts = {str(model.measured["longbench"].get("prompts", "published")) for model in models} - {"published"}
    if lacking:
        found.append(f"* without {len(lacking)} of 21 tasks ({', '.join(sorted(lacking))})")
    if short:
        found.append(f"* fewer questions than published in {len(short)} of the tasks asked")
    if prompts:
        found.append(f"prompts: {'; '.join(sorted(prompts))}")
    if any(model.settings.get("template", "base") != "base" for model in models):
        found.append("questions in the model's chat template")
    warning = f"**Not LongBench's numbers:** {'; '.join(found)}." if found else ""
    paper = published()
    return [warning, f"Published: {paper['model']}; {paper['longbench']['what']}."]


def short_text(measured: Measured) -> Section:
    """What the extension cost within short inputs."""
    title, models = "Short text", measured.of("short")
    if not models:
        words = "Short text was not run (`--suite short`): what the extension costs there is not known."
        return Section("short", title, [missing(words)])
    paper = published()["short"]["tasks"]
    tasks = list(dict.fromkeys(task for model in models for task in model.measured["short"]["tasks"]))
    shown = [*tasks, *(task for task in next(iter(paper.values())) if task not in (*tasks, "mean")), "mean"]
    rows = []
    for task in shown:
        ours = [
            cells.percent(model, ("short", task, 0, "score"), complete=task != "mean" or _mean_is_complete(model))
            for model in models
        ]
        theirs = [f"{of[task]:.2f}" if task in of else NONE for of in paper.values()]
        rows.append(Row(Cell(task, small=_how(models, task)), [*ours, *theirs]))
    table = Table(
        [*(model.name for model in models), *map(cells.published_column, paper)],
        rows,
        "Percent.",
        [*(model.key for model in models), *["paper"] * len(paper)],
    )
    asides = note([cells.AS_ABOVE, *measured.left_out("short")])
    return Section("short", title, [*note(_short_limits(models)), table, *asides])


def _mean_is_complete(model: Model) -> bool:
    return bool(model.measured["short"]["mean"]["complete"])


def _how(models: list[Model], task: str) -> str:
    """Shots and questions."""
    row = next((m.measured["short"]["tasks"][task] for m in models if task in m.measured["short"]["tasks"]), None)
    if row is None:
        return ""
    shots = "" if row.get("shots") is None else f"{row['shots']} shots, "
    return f"{shots}{row['questions']:,} questions"


def _short_limits(models: list[Model]) -> list[str]:
    means = [model.measured["short"]["mean"] for model in models]
    lacking = sorted({name for mean in means for name in mean["missing"]})
    limits = sorted({str(model.measured["short"]["limit"]) for model in models if model.measured["short"]["limit"]})
    found = []
    if lacking:
        found.append(f"* a mean without {', '.join(lacking)}.")
    if limits:
        found.append(f"* the first {', '.join(limits)} questions of each (sub)task only.")
    paper = published()
    return [*found, f"Published: {paper['model']}, {paper['short']['what']}: another training."]
