"""LongBench as a suite: its questions, one at a time, and the score of an answer."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.evaluate.suites.benchmark import Sample
from endprompt_megatron.evaluate.suites.longbench.longbench_data import Data
from endprompt_megatron.evaluate.suites.longbench.longbench_metrics import METRICS
from endprompt_megatron.evaluate.suites.longbench.longbench_prompts import (
    find_prompts,
    is_published,
    prompt_ids,
    read_prompts,
)
from endprompt_megatron.evaluate.suites.longbench.longbench_tasks import EXTENDED_TASKS, TASKS, Task
from endprompt_megatron.tokenizer import Tokenizer

SUITE, SUITE_E = "longbench", "longbench_e"


@dataclass(frozen=True)
class LongBenchSettings:
    """What to ask, and from which files."""

    data: Path  # data.zip, or a directory with data/NAME.jsonl
    max_length: int  # tokens of a prompt, above which its middle is cut out (prompts.default_max_length)
    tasks: tuple[str, ...] | None = None  # None: all 21, or the 13 of LongBench-E
    extended: bool = False  # LongBench-E: NAME_e.jsonl, scores by length
    limit: int | None = None  # only the first so many questions of a task
    prompts: Path | None = None  # dataset2prompt.json; None: beside the data
    chat: str | None = None  # a chat template with {prompt} in it (prompts.chat_wrapper); None: a base model


def check(settings: LongBenchSettings) -> dict[str, int]:
    """Read everything once, and count the questions of each task.  Raises InputError for whatever is wrong."""
    tasks, data, _ = _open(settings)
    counts = {}
    for task in tasks:
        number = sum(1 for _ in data.records(task, settings.extended))
        counts[task.name] = number if settings.limit is None else min(number, settings.limit)
    return counts


def samples(settings: LongBenchSettings, tokenizer: Tokenizer) -> Iterator[Sample]:
    """Every question, task by task, made when it is asked for.

    `number` is the place in the task's file, `length` is `max_length`.  Raises InputError, before the first question
    for all that `check` finds.
    """
    check(settings)
    return _samples(settings, tokenizer)


def _samples(settings: LongBenchSettings, tokenizer: Tokenizer) -> Iterator[Sample]:
    tasks, data, templates = _open(settings)
    for task in tasks:
        template = templates[task.name]
        published = is_published(task, template)
        for number, record in enumerate(data.records(task, settings.extended)):
            if number == settings.limit:
                break
            chat = settings.chat if task.chat else None
            ids, cut = prompt_ids(tokenizer, template, record, settings.max_length, chat)
            yield Sample(
                suite=SUITE_E if settings.extended else SUITE,
                task=task.name,
                length=settings.max_length,
                number=number,
                prompt=ids,
                max_new_tokens=task.max_new_tokens,
                references=record.answers,
                # No `stop`, although few-shot answers end with their line: an answer may begin with empty lines.
                extra={
                    "classes": record.classes,
                    "words": record.words,
                    "cut": cut,
                    "published_prompt": published,
                },
            )


def score(sample: Sample, answer: str) -> float:
    """The best of the answer's scores against the references, 0..1, as the benchmark's eval.py has it."""
    task = TASKS[sample.task]
    if task.first_line_only:
        answer = answer.lstrip("\n").split("\n")[0]
    metric = METRICS[task.metric]
    return max(0.0, *(metric(answer, reference, sample.extra["classes"]) for reference in sample.references))


def sources(settings: LongBenchSettings) -> dict:
    """What the questions are made from.  Raises InputError as `check` does for missing files."""
    tasks, data, templates = _open(settings)
    return {
        "data": data.path,
        "prompts": find_prompts(data.path, settings.prompts),
        "published_prompts": all(is_published(task, templates[task.name]) for task in tasks),
    }


def _open(settings: LongBenchSettings) -> tuple[list[Task], Data, dict[str, str]]:
    """Tasks, data and templates.  Raises InputError for settings that cannot be."""
    every = EXTENDED_TASKS if settings.extended else tuple(TASKS)
    what = "LongBench-E" if settings.extended else "LongBench"
    for name in settings.tasks or ():
        if name not in every:
            raise InputError(f"{what}: there is no task {name!r}; its tasks are {', '.join(every)}")
    if settings.tasks == ():
        raise InputError(f"{what}: no tasks; use some of {', '.join(every)}")
    if settings.max_length < 2:
        raise InputError(f"{what}: prompts of {settings.max_length} tokens; use 2 or more")
    if settings.limit is not None and settings.limit < 1:
        raise InputError(f"{what}: {settings.limit} questions a task; use 1 or more")
    if settings.chat is not None and settings.chat.count("{prompt}") != 1:
        raise InputError(f"{what}: the chat template {settings.chat!r} should hold {{prompt}} once")
    tasks = [TASKS[name] for name in every if settings.tasks is None or name in settings.tasks]
    data = Data(settings.data)
    missing = data.missing(tasks, settings.extended)
    if missing:
        raise InputError(
            f"{settings.data}: {len(missing)} of {len(tasks)} files are missing: {', '.join(missing)}; "
            "get them, or name the tasks to ask"
        )
    file = find_prompts(data.path, settings.prompts)
    return tasks, data, read_prompts(file, tasks)
