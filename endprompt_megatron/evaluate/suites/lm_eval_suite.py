"""Short text as a suite: one request for each task, run by lm_eval.py with a model of its own, none of our engines."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from endprompt_megatron.common.errors import InputError, Unavailable
from endprompt_megatron.evaluate.intervals import Series
from endprompt_megatron.evaluate.options import LIMIT, TEMPLATE, Option, parse_names
from endprompt_megatron.evaluate.published_rows import model, note_on, published
from endprompt_megatron.evaluate.requests import Request, Response, content_of
from endprompt_megatron.evaluate.suite import Headline, Prepared, Published, Scores, Subject, Suite
from endprompt_megatron.evaluate.suites import lm_eval
from endprompt_megatron.evaluate.tables import quoted_bounds, scores_by_task


def _prepare(subject: Subject) -> Prepared:
    """Of tasks that nobody named, those that cannot be asked here are left out.

    Raises Unavailable if none is left or lm-eval is not installed, InputError if a named one cannot be asked.
    """
    s = subject.settings
    tasks = s.short_tasks or list(lm_eval.TASKS)
    for task in s.short_shots or {}:
        if task not in tasks:
            raise InputError(f"--short-shots {task}: not among the tasks asked, {', '.join(tasks)}")
    reasons = _left_out(lm_eval.left_out, tuple(tasks), s.short_include)
    for task, reason in reasons.items():
        if s.short_tasks:
            raise Unavailable(f"--short-tasks {task}: {reason}, or leave the task out")
        if len(reasons) == len(tasks):
            raise Unavailable(f"--suite short: {task} {reason}")
    asked = [task for task in tasks if task not in reasons]
    return Prepared(
        requests=lambda: _requests(subject, asked),
        result=lambda responses: result(responses, s.limit),
        series=series,
        expected=(len(asked), 0),
        left_out={f"short {task}": reason for task, reason in reasons.items()},
    )


@functools.lru_cache(maxsize=1)
def _left_out(check: Callable[..., dict[str, str]], tasks: tuple[str, ...], include: str | None) -> dict[str, str]:
    """`check` takes seconds, for lm-eval's import: once for all models."""
    return check(tasks, include=include)


def _parse_shots(flag: str, value: str) -> dict[str, int]:
    """Numbers of examples by task, of "mmlu=0,gsm8k=8".  Raises InputError."""
    shots = {}
    for part in parse_names(flag, value):
        task, equals, number = part.partition("=")
        if not (equals and task and number.isdigit()):
            raise InputError(f"{flag} {value}: should be TASK=NUMBER with commas between them, such as mmlu=0,gsm8k=8")
        shots[task] = int(number)
    return shots


def _requests(subject: Subject, tasks: list[str]) -> Iterator[Request]:
    """A killed evaluation goes on with the next task, at the price of loading the model for each."""
    s = subject.settings
    options = {"backend": "vllm" if s.engine == "vllm" else "hf", "dtype": s.dtype, "chat": s.template == "chat"}
    if s.short_include is not None:
        options["include"] = s.short_include
    for task in tasks:
        more = {"shots": {task: s.short_shots[task]}} if task in (s.short_shots or {}) else {}

        def ask(_: object, task: str = task, options: dict = options | more) -> dict:
            return lm_eval.run(subject.model.config, [task], s.limit, **options)

        yield Request("short", task, 0, 0, content_of(task, s.limit, options | more), 0, ask=ask, alone=True)


def result(responses: list[Response], limit: int | None) -> dict:
    """What lm_eval.run says of all the tasks together, scores in percent."""
    tasks = {name: row for response in responses for name, row in response.record["tasks"].items()}
    there = [name for name in lm_eval.TASKS if name in tasks]
    missing = [name for name in lm_eval.TASKS if name not in tasks]
    return {
        "tasks": tasks,
        "mean": {
            "score": sum(tasks[name]["score"] for name in there) / len(there) if there else None,
            "complete": not missing and limit is None,
            "missing": missing,
        },
        "limit": limit,
        "lm_eval": responses[0].record["lm_eval"],
    }


def series(responses: list[Response]) -> list[Series]:
    """Right and wrong answers by task, and the tasks' mean.  lm-eval's answers are counted, not told apart."""
    found = {name: _values(row) for response in responses for name, row in response.record["tasks"].items()}
    of_tasks = [Series("short", task, 0, "score", (values,), paired=False) for task, values in found.items()]
    return [*of_tasks, Series("short", "mean", 0, "score", tuple(found.values()), paired=False)]


def _values(row: dict) -> np.ndarray:
    """A 1 for every right answer and a 0 for every other; a lone score where it is not such a share."""
    score, count = row["score"] / 100, row["questions"]
    right = round(score * count)
    if abs(score * count - right) > 1e-6 * count:
        return np.asarray([score])
    return np.r_[np.ones(right), np.zeros(count - right)]


def _headlines(measured: dict, scores: Scores) -> list[Headline]:
    key = ("short", "mean", 0, "score")
    if key not in scores:
        return []
    value, complete = f"{100 * scores[key]['score']:.1f}", bool(measured["mean"]["complete"])
    return [Headline("Short text, mean", key, value, quoted_bounds(scores[key]), complete)]


def _published(settings: Any) -> Published:
    tasks = published()["short"]["tasks"]
    rows = {method: {(task, 0): value for task, value in of.items()} for method, of in tasks.items()}
    columns = {task: (task, 0) for task in next(iter(tasks.values()))}
    return Published("task", rows, columns, note_on("short"), model())


def _task_note(measured: dict, task: str) -> str:
    row = measured["tasks"].get(task)
    if row is None:
        return ""
    shots = "" if row.get("shots") is None else f"{row['shots']} shots, "
    return f"{shots}{row['questions']:,} questions"


def _limits(measured: dict, settings: Any) -> list[str]:
    found = []
    if measured["mean"]["missing"]:
        found.append(f"a mean without {', '.join(measured['mean']['missing'])}")
    if measured["limit"]:
        found.append(f"only the first {measured['limit']} questions of each (sub)task")
    return found


SUITE = Suite(
    name="short",
    title="Short text",
    about="MMLU, GSM8K, HellaSwag, HumanEval or other tasks of lm-eval",
    options=(
        TEMPLATE,
        LIMIT,
        Option(
            "short_tasks",
            "lm-eval tasks; by default mmlu,gsm8k,hellaswag,humaneval",
            parse=parse_names,
            metavar="NAMES",
        ),
        Option(
            "short_shots",
            "examples before a question, by task: mmlu=0,gsm8k=8; by default 5, 5, 10 and 0, or lm-eval's own",
            parse=_parse_shots,
            metavar="NUMBERS",
        ),
        Option("short_include", "directory with lm-eval task files of your own", metavar="DIR", is_file=True),
    ),
    prepare=_prepare,
    refused_engines={"megatron": "lm-eval reads Hugging Face directories; export the model and give --hf"},
    inputs_from=("limit", "template", "short_shots"),
    by_length=False,
    means=("mean",),
    headlines=_headlines,
    tables=lambda results, labels: scores_by_task("Short text", "short", results, labels),
    published=_published,
    task_note=_task_note,
    incomplete_tasks=lambda measured: set() if measured["mean"]["complete"] else {"mean"},
    explanation=lambda measured: "What the extension costs within short inputs. Percent.",
    limits=_limits,
    unknown_without="what the extension costs within short inputs (short text)",
)
