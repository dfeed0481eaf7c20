"""LongBench in the table of suites (evaluate/registry.py)."""

import functools
from pathlib import Path
from typing import Any

from endprompt_megatron.common.text_table import text_table
from endprompt_megatron.evaluate.options import LIMIT, TEMPLATE, Option, parse_names
from endprompt_megatron.evaluate.published_rows import model, note_on, published
from endprompt_megatron.evaluate.suite import Grid, Headline, Prepared, Published, Scores, Shade, Subject, Suite
from endprompt_megatron.evaluate.suites.benchmark import Benchmark
from endprompt_megatron.evaluate.suites.longbench.longbench_prompts import chat_wrapper, default_max_length
from endprompt_megatron.evaluate.suites.longbench.longbench_suite import (
    LongBenchSettings,
    check,
    samples,
    score,
    sources,
)
from endprompt_megatron.evaluate.suites.longbench.longbench_summary import summary
from endprompt_megatron.evaluate.suites.longbench.longbench_tasks import EXTENDED_TASKS, GROUPS, NOT_CHINESE, TASKS
from endprompt_megatron.evaluate.tables import number_text, quoted_bounds, scores_by_task

_MEANS = {"mean_13": "mean of 13 tasks", "mean_16": "mean of 16 tasks", "mean_21": "mean of 21 tasks"}


def settings_for(subject: Subject) -> LongBenchSettings:
    """LongBench's own settings from those of the evaluation."""
    s, directory = subject.settings, subject.model.config
    return LongBenchSettings(
        data=Path(s.longbench_data),
        max_length=default_max_length(subject.model.window),
        tasks=tuple(s.longbench_tasks) if s.longbench_tasks else None,
        extended=s.longbench_e,
        limit=s.limit,
        prompts=Path(s.longbench_prompts) if s.longbench_prompts else None,
        chat=chat_wrapper(directory) if s.template == "chat" else None,
    )


def _prepare(subject: Subject) -> Prepared:
    settings = settings_for(subject)
    benchmark = Benchmark(
        name="longbench",
        samples=functools.partial(samples, settings),
        score=score,
        summary=summary,
        sources=functools.partial(sources, settings),
        by_length=False,
        groups=_groups(settings.extended),
    )
    return benchmark.prepare(subject, sum(check(settings).values()), settings.max_length)


def _groups(extended: bool) -> dict[str, list[str]]:
    """The groups and the mean that the paper reports, which leave the Chinese tasks out, and the mean of all.

    LongBench-E has its own mean alone.
    """
    if extended:
        return {"mean_13": list(EXTENDED_TASKS)}
    groups = {group: [name for name in NOT_CHINESE if TASKS[name].group == group] for group in GROUPS}
    return {**groups, "mean_16": list(NOT_CHINESE), "mean_21": list(TASKS)}


def _title(measured: dict) -> str:
    return SUITE.variant(measured) or SUITE.title


def _tables(results: dict, labels: list[str]) -> list[str]:
    parts = []
    for label in labels:
        measured = results["measurements"][label]["longbench"]
        title = _title(measured)
        parts += scores_by_task(title, "longbench", results, [label])
        if "by_words" in measured:
            header = ["task", *measured["by_words"]["mean"]]
            rows = [[task, *map(number_text, of.values())] for task, of in measured["by_words"].items()]
            parts.append(f"{title}, {label}: percent by words of the input\n{text_table(header, rows)}")
    return parts


def _grid(measured: dict) -> Grid | None:
    """LongBench-E's scores by words of the input."""
    by_words = measured.get("by_words")
    if by_words is None:
        return None
    rows = tuple(
        (task, tuple(None if score is None else Shade(score / 100, f"{score:.1f}") for score in of.values()))
        for task, of in by_words.items()
    )
    return Grid("task", tuple(f"{words} words" for words in by_words["mean"]), rows, "percent")


def _headlines(measured: dict, scores: Scores) -> list[Headline]:
    found = []
    for task in _MEANS:
        key = ("longbench", task, 0, "score")
        if key in scores:
            found.append(
                Headline(
                    f"{_title(measured)}, {task.removeprefix('mean_')} tasks",
                    key,
                    f"{100 * scores[key]['score']:.1f}",
                    quoted_bounds(scores[key]),
                    complete=bool((measured.get(task) or {}).get("complete")),
                )
            )
    return found


def _published(settings: Any) -> Published | None:
    if settings.longbench_e:  # the paper reports LongBench
        return None
    of = published()["longbench"]
    groups = of["groups"]
    rows = {method: {(group, 0): value for group, value in of.items()} for method, of in groups.items()}
    rows |= {name: {("mean_16", 0): value} for name, value in of["ablations"].items()}
    columns = {group: (group, 0) for group in next(iter(groups.values()))}
    return Published("group", rows, columns, note_on("longbench"), model())


def _incomplete(measured: dict) -> set[str]:
    means = {name: measured.get(name) or {} for name in _MEANS}
    groups = {name: of.get("not_chinese") or {} for name, of in measured.get("groups", {}).items()}
    return {name for name, of in (means | groups).items() if not of.get("complete")}


def _task_note(measured: dict, task: str) -> str:
    row = measured.get("tasks", {}).get(task)
    return f"{row['questions']} of {row['published_questions']} questions" if row else ""


def _limits(measured: dict, settings: Any) -> list[str]:
    found, missing = [], measured.get("missing") or []
    every = 13 if "mean_13" in measured else 21
    short = (measured.get(f"mean_{every}") or {}).get("short") or []
    if missing:
        found.append(f"without {len(missing)} of {every} tasks ({', '.join(missing)})")
    if short:
        found.append(f"fewer questions than published in {len(short)} of the tasks asked")
    if measured.get("prompts", "published") != "published":
        found.append(f"prompts: {measured['prompts']}")
    if settings.template != "base":
        found.append("questions in the model's chat template")
    return found


SUITE = Suite(
    name="longbench",
    title="LongBench",
    about="LongBench's 21 tasks, or the 13 of LongBench-E, cut in the middle to the model's window",
    options=(
        TEMPLATE,
        LIMIT,
        Option("longbench_data", "LongBench's data.zip, or the directory with its files", metavar="PATH", is_file=True),
        Option(
            "longbench_prompts",
            "the benchmark's dataset2prompt.json, if it is not beside the data",
            metavar="FILE",
            is_file=True,
        ),
        Option(
            "longbench_e",
            "ask LongBench-E: 13 tasks, scores by length in words",
            bool,
            default=False,
            refused_without_suite=True,
        ),
        Option("longbench_tasks", "some of the 21 tasks; by default all", parse=parse_names, metavar="NAMES"),
    ),
    prepare=_prepare,
    requires={
        "longbench_data": "--suite longbench needs the benchmark's data.zip, or the directory with its data/*.jsonl"
    },
    inputs_from=("limit", "template", "longbench_e"),
    sources=lambda measured: {"prompts": measured.get("prompts")},
    by_length=False,
    means=tuple(_MEANS),
    task_names={
        "single_doc_qa": "one document",
        "multi_doc_qa": "several documents",
        "summarization": "summaries",
        "few_shot": "few-shot",
        **_MEANS,
    },
    headlines=_headlines,
    tables=_tables,
    grid=_grid,
    variant=lambda measured: "LongBench-E" if "mean_13" in measured else "",
    published=_published,
    task_note=_task_note,
    incomplete_tasks=_incomplete,
    explanation=lambda measured: (
        "Questions about, summaries of and additions to real documents. Percent; the groups and the first mean are "
        "without the Chinese tasks."
    ),
    limits=_limits,
    unknown_without="questions about and summaries of real documents (LongBench)",
)
