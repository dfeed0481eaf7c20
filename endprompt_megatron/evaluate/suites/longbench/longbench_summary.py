"""LongBench's table: by task, by group, the mean that the paper used and the mean of all tasks, in percent.

A mean weighs tasks alike, as the published tables do.  One over fewer tasks or questions than published is no
LongBench score: what it lacks stands beside it.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from endprompt_megatron.evaluate.suites.benchmark import Sample
from endprompt_megatron.evaluate.suites.longbench.longbench_suite import SUITE_E
from endprompt_megatron.evaluate.suites.longbench.longbench_tasks import (
    EXTENDED_TASKS,
    GROUPS,
    NOT_CHINESE,
    TASKS,
)

BUCKETS = ("0-4k", "4-8k", "8k+")  # of LongBench-E, in words


def summary(scored: Iterable[tuple[Sample, ...]]) -> dict:
    """Tables of scored questions, each a tuple of the sample (its prompt is not looked at), ..., and its score 0..1.

    Returns {"prompts", "tasks": {name: {"score", "questions", "published_questions", "group"}}, "groups": {group:
    {"not_chinese": MEAN, "all": MEAN}}, "mean_16": MEAN, "mean_21": MEAN, "missing": [names]}; for LongBench-E
    {"prompts", "tasks", "mean_13", "by_words": {name or "mean": {bucket: score}}, "missing"}.  MEAN is {"score",
    "complete", "missing": [tasks], "short": [tasks with fewer questions than published]}.  A score is None where
    there is nothing to average; those of tasks are rounded to 0.01 as the benchmark does, means are not.
    """
    scores: dict[str, list[float]] = defaultdict(list)
    buckets: dict[str, dict[str, list[float]]] = defaultdict(lambda: {bucket: [] for bucket in BUCKETS})
    own_prompts: set[str] = set()
    extended = False
    for sample, *_, value in scored:
        scores[sample.task].append(value)
        if not sample.extra["published_prompt"]:
            own_prompts.add(sample.task)
        if sample.suite == SUITE_E:
            extended = True
            buckets[sample.task][_bucket(sample.extra["words"])].append(value)
    every = EXTENDED_TASKS if extended else tuple(TASKS)
    tasks = {}
    for name in every:
        if name in scores:
            tasks[name] = {
                "group": TASKS[name].group,
                "score": round(_percent(scores[name]), 2),
                "questions": len(scores[name]),
                "published_questions": TASKS[name].size_e if extended else TASKS[name].size,
            }
    exact = {name: _percent(values) for name, values in scores.items()}
    result = {
        "prompts": "published" if not own_prompts else f"not the published ones: {', '.join(sorted(own_prompts))}",
        "tasks": tasks,
        "missing": [name for name in every if name not in tasks],
    }
    if extended:
        return {**result, "mean_13": _mean(every, tasks, exact), "by_words": _by_words(buckets)}
    return {
        **result,
        "groups": {
            group: {
                "not_chinese": _mean(_of_group(NOT_CHINESE, group), tasks, exact),
                "all": _mean(_of_group(every, group), tasks, exact),
            }
            for group in GROUPS
        },
        "mean_16": _mean(NOT_CHINESE, tasks, exact),
        "mean_21": _mean(every, tasks, exact),
    }


def _percent(values: list[float]) -> float:
    total = 0.0  # not sum(): from Python 3.12 it rounds otherwise than the benchmark's loop
    for value in values:
        total += value
    return 100 * total / len(values)


def _of_group(names: Sequence[str], group: str) -> list[str]:
    return [name for name in names if TASKS[name].group == group]


def _mean(names: Sequence[str], tasks: dict[str, dict], exact: dict[str, float]) -> dict:
    """The mean over those of `names` that were asked, and what it lacks."""
    there = [name for name in names if name in tasks]
    missing = [name for name in names if name not in tasks]
    short = [name for name in there if tasks[name]["questions"] < tasks[name]["published_questions"]]
    return {
        "score": sum(exact[name] for name in there) / len(there) if there else None,
        "complete": not missing and not short,
        "missing": missing,
        "short": short,
    }


def _bucket(words: int) -> str:
    return BUCKETS[0] if words < 4000 else BUCKETS[1] if words < 8000 else BUCKETS[2]


def _by_words(buckets: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float | None]]:
    """Scores by task and bucket, and under "mean" the mean of the tasks that have questions in a bucket."""
    table = {
        name: {bucket: round(_percent(values), 2) if values else None for bucket, values in of_task.items()}
        for name, of_task in buckets.items()
    }
    mean = {}
    for bucket in BUCKETS:
        there = [_percent(of_task[bucket]) for of_task in buckets.values() if of_task[bucket]]
        mean[bucket] = sum(there) / len(there) if there else None
    return {**table, "mean": mean}
