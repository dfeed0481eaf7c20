"""Scores of answers as NVIDIA's evaluation gives them, and the table over tasks and lengths."""

import re
from collections.abc import Iterable

from endprompt_megatron.evaluate.suites.benchmark import Sample
from endprompt_megatron.evaluate.suites.ruler.ruler_settings import QA_FILES, SAMPLES
from endprompt_megatron.evaluate.suites.ruler.ruler_tasks import PART, TASKS

NOT_COMPARABLE = "not comparable to published RULER: "  # how each note begins
_CONTROL = re.compile(r"[\x00-\x1f]")


def score(sample: Sample, answer: str) -> float:
    """0..1: the share of references that stand in the answer, in any case of letters; for QA, whether one does."""
    text = _CONTROL.sub("\n", answer.strip()).strip().lower()
    hits = [1.0 if reference.lower() in text else 0.0 for reference in sample.references]
    return max(hits) if TASKS[sample.task].match == PART else sum(hits) / len(hits)


def summary(scored: Iterable[tuple[Sample, ...]]) -> dict:
    """The table of scored questions, each a tuple of the sample (its prompt is not looked at), ..., its score 0..1.

    Returns {"scores": {task: {length: percent}}, "samples": {task: {length: count}}, "by_length": {length: {"mean",
    "tasks", "samples"}}, "mean": of the lengths' means, "questions": count, "haystack": name or None, "left_out":
    {task: reason}, "comparable": bool, "notes": [why it is not comparable to published RULER]}.  Percentages are
    rounded to 0.01 as NVIDIA's are, means are means of those, lengths are texts; None where there is nothing.
    """
    values: dict[tuple[str, int], list[float]] = {}
    deviations: dict[str, None] = {}  # in the order of their appearance
    haystack = None
    for sample, *_, value in scored:
        values.setdefault((sample.task, sample.length), []).append(value)
        deviations |= dict.fromkeys(sample.extra.get("deviations", ()))
        haystack = sample.extra.get("haystack", haystack)
    lengths = sorted({length for _, length in values})
    tasks = [task for task in TASKS if any(task == name for name, _ in values)]
    scores = {key: round(sum(of_key) / len(of_key) * 100, 2) for key, of_key in values.items()}
    by_length = {}
    for length in lengths:
        there = [task for task in tasks if (task, length) in scores]
        by_length[str(length)] = {
            "mean": _mean([scores[task, length] for task in there]),
            "tasks": len(there),
            "samples": sum(len(values[task, length]) for task in there),
        }
    left_out = {task: _missing(task) for task in TASKS if task not in tasks}
    notes = _notes(values, lengths, left_out) + list(deviations)
    return {
        "scores": {task: {str(n): scores[task, n] for n in lengths if (task, n) in scores} for task in tasks},
        "samples": {task: {str(n): len(values[task, n]) for n in lengths if (task, n) in values} for task in tasks},
        "by_length": by_length,
        "mean": _mean([row["mean"] for row in by_length.values()]),
        "questions": sum(map(len, values.values())),
        "haystack": haystack,
        "left_out": left_out,
        "comparable": not notes,
        "notes": [NOT_COMPARABLE + note for note in notes],
    }


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _missing(task: str) -> str:
    return f"not asked; it needs --{QA_FILES[task]} FILE" if task in QA_FILES else "not asked"


def _notes(values: dict[tuple[str, int], list[float]], lengths: list[int], left_out: dict[str, str]) -> list[str]:
    notes = []
    if left_out:
        notes.append(f"{len(TASKS) - len(left_out)} of {len(TASKS)} tasks, without {', '.join(left_out)}")
    for length in lengths:
        absent = [task for task in TASKS if task not in left_out and (task, length) not in values]
        if absent:
            notes.append(f"at {length} tokens without {', '.join(absent)}")
    fewest = min(map(len, values.values()), default=0)
    most = max(map(len, values.values()), default=0)
    if (fewest, most) != (SAMPLES, SAMPLES):
        counted = str(fewest) if fewest == most else f"{fewest} to {most}"
        notes.append(f"{counted} samples a task and length instead of {SAMPLES}")
    return notes
