"""What a study found: every score by row with intervals, and every row against the reference.  numpy alone.

A row's score is the mean over its seeds.  Two intervals of 95% stand beside it, for two sources of chance: Student's
over the seeds' means (other runs), and a bootstrap over questions of each question's mean over the seeds (other
questions).  A difference to the reference is taken question by question and seed by seed, and counts as beyond the
noise where neither of its two intervals holds 0; with one seed only the questions can speak.
"""

import json
from dataclasses import dataclass, field

import numpy as np

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.files import read_json
from endprompt_megatron.evaluate.intervals import bootstrap, interval, mean, t_interval
from endprompt_megatron.evaluate.registry import EXTENDED
from endprompt_megatron.study.grid import OVER, Study
from endprompt_megatron.study.trial import Work

Key = tuple[str, str, int, str]  # suite, task, length, metric


@dataclass
class Measured:
    """One cell's evaluation: the values behind each score, the losses by position, what it was asked, what it cost."""

    name: str
    values: dict[Key, list[np.ndarray]]
    by_position: list[dict]
    asked: dict
    state: dict
    unpaired: set[Key] = field(default_factory=set)  # scores whose values are in no order of questions


def compare(study: Study) -> dict:
    """The comparison of all cells that are done, as study.json holds it.  Raises InputError if none is."""
    works = [Work(study, cell) for cell in study.cells]
    done = [work for work in works if not work.left]
    if not done:
        raise InputError(f"{study.path}: no cell is done yet; run tools/study.py {study.path} first")
    rows: dict[str, list[Measured]] = {row: [] for row in study.rows}
    for work in done:
        rows[work.cell.row].append(read_cell(work))
    _refuse_others([each for row in rows.values() for each in row])
    found = {row: measured for row, measured in rows.items() if measured}
    reference = found.get(study.reference) if study.reference else None
    return {
        "format": 1,
        "title": study.title,
        "about": study.about,
        "axes": study.axes,
        "reference": study.reference,
        "evaluation": done[0].options,
        "missing": [work.cell.name for work in works if work.left],
        "rows": [_row(study, name, measured, reference) for name, measured in found.items()],
    }


def read_cell(work: Work) -> Measured:
    """A finished cell.  Raises InputError for a file that is missing or broken."""
    directory = work.directory / "evaluation"
    results = read_json(directory / "results.json", "the results of evaluate.py")
    raw = read_json(directory / "values.json", "the values behind an evaluation's scores")
    values, unpaired = {}, set()
    for each in raw.get(EXTENDED, []):
        key = (each["suite"], each["task"], each["length"], each["metric"])
        values[key] = [np.asarray(stratum, dtype=np.float64) for stratum in each["strata"]]
        if not each["paired"]:
            unpaired.add(key)
    perplexity = results["measurements"][EXTENDED].get("perplexity", {})
    asked = {"settings": results["settings"], "text": (results.get("text") or {}).get("sha256")}
    return Measured(work.cell.name, values, perplexity.get("by_position", []), asked, work.state, unpaired)


def _refuse_others(cells: list[Measured]) -> None:
    """Raise InputError unless all cells were asked the same."""
    for cell in cells[1:]:
        if cell.asked != cells[0].asked:
            raise InputError(
                f"cells {cells[0].name} and {cell.name} were not asked the same (settings or text differ): "
                "evaluate them anew"
            )


def _row(study: Study, name: str, cells: list[Measured], reference: list[Measured] | None) -> dict:
    return {
        "name": name,
        "levels": {axis: level for axis, level in cells[0].state["levels"].items() if axis != OVER},
        "trained": cells[0].state["trained"],
        "cells": [cell.name for cell in cells],
        "training": _training(cells),
        "scores": [score(key, cells) for key in cells[0].values],
        "differences": differences(cells, reference) if reference and name != study.reference else [],
        "by_position": _by_position(cells),
        "cost": _cost(cells),
    }


def _training(cells: list[Measured]) -> dict | None:
    """What the row's recipe says of its budget, the same for all of its seeds."""
    state = cells[0].state
    if not state["trained"]:
        return None
    recipe = state["recipe"]
    return {
        "method": recipe["context"]["method"],
        "rope": recipe["context"]["rope"]["type"],
        "physical": recipe["context"]["physical"],
        "global_batch_size": recipe["train"]["global_batch_size"],
        **{key: state["cost"][key] for key in ("tokens", "samples", "steps")},
    }


def _seeds(key: Key, cells: list[Measured]) -> list[float]:
    return [mean(cell.values[key]) for cell in cells]


def _over_seeds(key: Key, cells: list[Measured]) -> list[np.ndarray]:
    """Each question's mean over the cells, by stratum."""
    return [np.mean(each, axis=0) for each in zip(*(cell.values[key] for cell in cells), strict=True)]


def score(key: Key, cells: list[Measured]) -> dict:
    """A row's score: mean over seeds, each seed's, and the intervals over seeds and over questions."""
    seeds = _seeds(key, cells)
    strata = _over_seeds(key, cells)
    over_questions = interval(strata)
    return {
        **dict(zip(("suite", "task", "length", "metric"), key, strict=True)),
        "mean": float(np.mean(seeds)),
        "seeds": seeds,
        "over_seeds": _list(t_interval(seeds)),
        "over_questions": [over_questions.low, over_questions.high] if over_questions else None,
        "samples": int(sum(len(values) for values in strata)),
    }


def differences(cells: list[Measured], reference: list[Measured]) -> list[dict]:
    """The row minus the reference for every score that both have, over the seeds that both have.

    A row without seeds, or of which no seed is the reference's, is compared with the mean of all of the reference's.
    """
    pairs = _pairs(cells, reference)
    found = []
    for key in cells[0].values:
        if key not in reference[0].values:
            continue
        by_seed = [
            [np.subtract(mine, others) for mine, others in zip(_over_seeds(key, a), _over_seeds(key, b), strict=True)]
            for a, b in pairs
        ]
        seeds = [mean(strata) for strata in by_seed]
        over_seeds = t_interval(seeds)
        strata = [np.mean(each, axis=0) for each in zip(*by_seed, strict=True)]
        several = key not in cells[0].unpaired and any(len(values) > 1 for values in strata)
        questions = bootstrap(strata) if several else None
        told = [bounds for bounds in (over_seeds, questions) if bounds is not None]
        found.append(
            {
                **dict(zip(("suite", "task", "length", "metric"), key, strict=True)),
                "difference": float(np.mean(seeds)),
                "seeds": seeds,
                "over_seeds": _list(over_seeds),
                "over_questions": _list(questions),
                "beyond_noise": bool(told) and all(low > 0 or high < 0 for low, high in told),
            }
        )
    return found


def _pairs(cells: list[Measured], reference: list[Measured]) -> list[tuple[list[Measured], list[Measured]]]:
    """Who is compared with whom."""
    theirs = {cell.state["levels"].get(OVER): cell for cell in reference}
    same = [(cell, theirs.get(cell.state["levels"].get(OVER))) for cell in cells]
    pairs = [([mine], [other]) for mine, other in same if other is not None]
    if pairs:
        return pairs
    if len(cells) == 1:  # the untrained model: each of the reference's seeds differs from it in its own way
        return [(cells, [other]) for other in reference]
    return [(cells, reference)]


def _by_position(cells: list[Measured]) -> list[dict]:
    """Losses by position, means over seeds."""
    return [
        {"start": buckets[0]["start"], "end": buckets[0]["end"], "loss": float(np.mean([b["loss"] for b in buckets]))}
        for buckets in zip(*(cell.by_position for cell in cells), strict=True)
    ]


def _cost(cells: list[Measured]) -> dict:
    """Means over seeds of seconds and speed, and the highest peak of memory."""

    def average(values: list[float]) -> float | None:
        return round(float(np.mean(values)), 3) if values else None

    stages = [cell.state["stages"] for cell in cells]
    costs = [cell.state["cost"] for cell in cells]
    return {
        "step_seconds": average([cost["step_seconds"] for cost in costs if "step_seconds" in cost]),
        "tokens_per_s": average([cost["tokens_per_s"] for cost in costs if "tokens_per_s" in cost]),
        "memory_gib": max((cost["memory_gib"] for cost in costs if "memory_gib" in cost), default=None),
        "seconds": {s: average([of[s]["seconds"] for of in stages if s in of]) for s in stages[0]},
        "cpu_seconds": {s: average([of[s]["cpu_seconds"] for of in stages if s in of]) for s in stages[0]},
    }


def _list(bounds: tuple[float, float] | None) -> list[float] | None:
    return None if bounds is None else [float(bound) for bound in bounds]


def as_json(comparison: dict) -> str:
    """Text of study.json, one line a row."""
    head = json.dumps({key: value for key, value in comparison.items() if key != "rows"}, indent=1)
    rows = ",\n".join(json.dumps(row) for row in comparison["rows"])
    return f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'
