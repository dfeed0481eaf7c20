"""A trial's evaluation as read from its files: the values behind each score, and what made them."""

from dataclasses import dataclass, field

import numpy as np

from endprompt_megatron.common.files import read_json
from endprompt_megatron.evaluate.registry import EXTENDED, Key, suites_in
from endprompt_megatron.study.trial import Work


@dataclass
class Measured:
    """One trial's evaluation: the values behind each score, losses by position, its settings, and what it cost."""

    name: str
    values: dict[Key, list[np.ndarray]]
    by_position: list[dict]
    inputs: dict  # what made the requests: settings and text
    state: dict
    unpaired: set[Key] = field(default_factory=set)  # scores whose values are not in the order of the requests


def read_trial(work: Work) -> Measured:
    """A finished trial's last evaluation.  Raises InputError for a file that is missing or broken."""
    directory = work.results
    results = read_json(directory / "results.json", "the results of evaluate.py")
    raw = read_json(directory / "values.json", "the values behind an evaluation's scores")
    values, unpaired = {}, set()
    for each in raw.get(EXTENDED, []):
        key = (each["suite"], each["task"], each["length"], each["metric"])
        values[key] = [np.asarray(stratum, dtype=np.float64) for stratum in each["strata"]]
        if not each["paired"]:
            unpaired.add(key)
    measured = results["measurements"][EXTENDED]
    losses = [suite.losses_by_position(measured[suite.name]) for suite in suites_in(results) if suite.name in measured]
    by_position = next(filter(None, losses), [])
    inputs = {"settings": results["settings"], "text": (results.get("text") or {}).get("sha256")}
    return Measured(work.trial.name, values, by_position, inputs, work.state, unpaired)


def paired(
    trials: list[Measured], reference: list[Measured], average: tuple[str, ...]
) -> list[tuple[list[Measured], list[Measured]]]:
    """Who is compared with whom: of the same base model and seed.

    An untrained model has no seed: each of the reference's seeds differs from it in its own way.
    """
    if len(trials) == 1 and not trials[0].state["levels"]:
        return [(trials, [other]) for other in reference]
    pairs = [([mine], [other]) for mine in trials for other in reference if _alike(mine, other, average)]
    return pairs or [(trials, reference)]


def _alike(mine: Measured, other: Measured, average: tuple[str, ...]) -> bool:
    ours, theirs = mine.state["levels"], other.state["levels"]
    return all(ours[axis] == theirs[axis] for axis in average if axis in ours and axis in theirs)
