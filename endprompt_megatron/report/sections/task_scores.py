"""LongBench by group and short text by task, before and after, with the paper's rows beside."""

from html import escape

from endprompt_megatron.evaluate.score_tables import published
from endprompt_megatron.report.html import details, missing, note, section, table
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


def longbench(measured: Measured) -> str:
    """Groups and means, the tasks folded; LongBench-E by words of the input."""
    title, models = "LongBench", measured.of("longbench")
    if not models:
        return section("longbench", title, missing("LongBench was not run (<code>--suite longbench</code>)."))
    if any("by_words" in model.measured["longbench"] for model in models):
        return _longbench_e(measured, models)
    paper = published()["longbench"]["groups"]
    head = [*map(cells.head, models), *map(_papers, paper)]
    rows = []
    for key, name in _GROUPS.items():
        ours = [cells.percent(m, ("longbench", key, 0, "score"), whole=_whole(m, key)) for m in models]
        theirs = [f"{of[key]:.2f}" if key in of else NONE for of in paper.values()]
        rows.append((name, [*ours, *theirs]))
    columns = [*(model.key for model in models), *["paper"] * len(paper)]
    return section(
        "longbench",
        title,
        note(_longbenchs_limits(models)),
        table(head, rows, caption="Percent. Groups and the first mean are without Chinese tasks.", columns=columns),
        note([cells.AS_ABOVE, *map(escape, measured.left_out("longbench"))]),
        _by_task(models),
    )


def _longbench_e(measured: Measured, models: list[Model]) -> str:
    """LongBench-E: the mean of its 13 tasks, and by words of the input.  The paper has no numbers of it."""
    means = [cells.percent(m, ("longbench", "mean_13", 0, "score"), whole=_whole(m, "mean_13")) for m in models]
    head, columns = [*map(cells.head, models)], [model.key for model in models]
    by_words = [model.measured["longbench"]["by_words"] for model in models]
    folded = []
    for model, of_model in zip(models, by_words, strict=True):
        body = [(escape(task), list(map(_number, of.values()))) for task, of in of_model.items() if task != "mean"]
        folded.append(details(f"By task and words: {cells.head(model)}", table(list(of_model["mean"]), body)))
    rows = [("mean of 13 tasks", means)]
    rows += [(f"{words} words", [_number(of["mean"][words]) for of in by_words]) for words in by_words[0]["mean"]]
    return section(
        "longbench",
        "LongBench-E",
        note(_longbenchs_limits(models)),
        table(head, rows, caption="Percent.", columns=columns),
        note([cells.AS_ABOVE, *map(escape, measured.left_out("longbench"))]),
        _by_task(models),
        *folded,
    )


def _by_task(models: list[Model]) -> str:
    """Every task, folded."""
    tasks = list(dict.fromkeys(task for model in models for task in model.measured["longbench"].get("tasks", {})))
    rows = []
    for task in tasks:
        scores = [cells.percent(model, ("longbench", task, 0, "score")) for model in models]
        rows.append((escape(task), [*scores, _asked(models, task)]))
    return details("By task", table([*map(cells.head, models), "questions"], rows))


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.1f}"


def _papers(name: str) -> str:
    """A method of the paper at the top of its column."""
    return f"{escape(name)}<small>published</small>"


def _mean(model: Model, key: str) -> dict:
    found = model.measured["longbench"]
    return found.get(key) or (found.get("groups", {}).get(key) or {}).get("not_chinese") or {}


def _whole(model: Model, key: str) -> bool:
    return bool(_mean(model, key).get("complete"))


def _asked(models: list[Model], task: str) -> str:
    """Questions of a task, of how many there are."""
    rows = [model.measured["longbench"]["tasks"].get(task) for model in models]
    row = next((row for row in rows if row), None)
    return f"{row['questions']} of {row['published_questions']}" if row else NONE


def _longbenchs_limits(models: list[Model]) -> list[str]:
    """What keeps these scores from being LongBench's."""
    found = []
    lacking = {name for model in models for name in model.measured["longbench"].get("missing") or []}
    extended = any("mean_13" in model.measured["longbench"] for model in models)
    name, mean, every = ("LongBench-E", "mean_13", 13) if extended else ("LongBench", "mean_21", 21)
    short = {name for model in models for name in _mean(model, mean).get("short") or []}
    prompts = {str(model.measured["longbench"].get("prompts", "published")) for model in models} - {"published"}
    if lacking:
        found.append(f"* without {len(lacking)} of {every} tasks ({escape(', '.join(sorted(lacking)))})")
    if short:
        found.append(f"* fewer questions than published in {len(short)} of the tasks asked")
    if prompts:
        found.append(f"prompts: {escape('; '.join(sorted(prompts)))}")
    if any(model.settings.get("template", "base") != "base" for model in models):
        found.append("questions in the model's chat template")
    sorry = f"<strong>Not {name}'s numbers:</strong> {'; '.join(found)}." if found else ""
    if extended:
        return [sorry]
    paper = published()
    return [sorry, f"Published: {escape(paper['model'])}; {escape(paper['longbench']['what'])}."]


def short_text(measured: Measured) -> str:
    """What the extension cost within short inputs."""
    title, models = "Short text", measured.of("short")
    if not models:
        words = "Short text was not run (<code>--suite short</code>): what the extension costs there is not known."
        return section("short", title, missing(words))
    paper = published()["short"]
    tasks = list(dict.fromkeys(task for model in models for task in model.measured["short"]["tasks"]))
    shown = [*tasks, *(task for task in next(iter(paper["tasks"].values())) if task not in (*tasks, "mean")), "mean"]
    rows = []
    for task in shown:
        whole = [task != "mean" or bool(model.measured["short"]["mean"]["complete"]) for model in models]
        key = ("short", task, 0, "score")
        ours = [cells.percent(model, key, whole=all_of_it) for model, all_of_it in zip(models, whole, strict=True)]
        theirs = [f"{of[task]:.2f}" if task in of else NONE for of in paper["tasks"].values()]
        rows.append((f"{escape(task)}{_how(models, task)}", [*ours, *theirs]))
    head = [*map(cells.head, models), *map(_papers, paper["tasks"])]
    columns = [*(model.key for model in models), *["paper"] * len(paper["tasks"])]
    return section(
        "short",
        title,
        note(_shorts_limits(models)),
        table(head, rows, caption="Percent.", columns=columns),
        note([cells.AS_ABOVE, *map(escape, measured.left_out("short"))]),
    )


def _how(models: list[Model], task: str) -> str:
    """Shots and questions, small."""
    row = next((m.measured["short"]["tasks"][task] for m in models if task in m.measured["short"]["tasks"]), None)
    if row is None:
        return ""
    shots = "" if row.get("shots") is None else f"{row['shots']} shots, "
    return f"<small>{shots}{row['questions']:,} questions</small>"


def _shorts_limits(models: list[Model]) -> list[str]:
    means = [model.measured["short"]["mean"] for model in models]
    lacking = sorted({name for mean in means for name in mean["missing"]})
    limits = sorted({str(model.measured["short"]["limit"]) for model in models if model.measured["short"]["limit"]})
    found = []
    if lacking:
        found.append(f"* a mean without {escape(', '.join(lacking))}.")
    if limits:
        found.append(f"* the first {escape(', '.join(limits))} questions of each (sub)task only.")
    paper = published()
    return [*found, f"Published: {escape(paper['model'])}, {escape(paper['short']['what'])}: another training."]
