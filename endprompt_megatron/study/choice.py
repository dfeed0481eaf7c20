"""`choose` and `measures` of a study.yaml: what a study is judged by, and the axis whose levels compete for it.

A comparison at one learning rate is no comparison of methods, so every variant may keep the level of an axis that
serves it best: all levels are tried where `where` says and measured on development data, and only the chosen one is
run elsewhere and measured on the data that the tables report.  No torch.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.evaluate.registry import SUITES, Key, Metric


@dataclass(frozen=True)
class Measure:
    """One number of a trial: the mean of a score over lengths."""

    name: str
    suite: str
    task: str
    lengths: tuple[int, ...]
    metric: str

    @property
    def keys(self) -> list[Key]:
        """The scores that it averages."""
        return [(self.suite, self.task, length, self.metric) for length in self.lengths]

    @property
    def reads(self) -> Metric:
        """Unit and digits, and whether lower is better."""
        return SUITES[self.suite].metric(self.metric)

    def as_dict(self) -> dict:
        """For study.json."""
        return {"name": self.name, "suite": self.suite, "task": self.task} | {
            "lengths": list(self.lengths),
            "metric": self.metric,
        }


@dataclass(frozen=True)
class Choose:
    """The levels of `over` compete in the trials of `where`, under `evaluation`'s options."""

    over: str
    where: dict[str, str]
    evaluation: dict[str, Any]

    def is_tried(self, levels: dict[str, str]) -> bool:
        """Whether a trial of these levels is one of those that the choice is made from.

        An untrained model has no level of most axes, and belongs to all of them.
        """
        return all(levels.get(axis, level) == level for axis, level in self.where.items())


def read_measures(path: Path, given: Any) -> tuple[Measure, ...]:
    """`{name: {suite, task, length, metric}}`; the first decides what is chosen.  Raises InputError."""
    if not isinstance(given, dict):
        raise InputError(f"{path}: measures={given} should be a mapping from names to suite, task, length and metric")
    found = []
    for name, keys in given.items():
        where = f"{path}: measures.{name}"
        if not isinstance(keys, dict) or set(keys) != {"suite", "task", "length", "metric"}:
            raise InputError(f"{where}={keys} should have exactly suite, task, length and metric")
        suite = SUITES.get(str(keys["suite"]))
        if suite is None:
            raise InputError(f"{where}.suite={keys['suite']} should be one of {', '.join(SUITES)}")
        metrics = [metric.name for metric in suite.metrics]
        if keys["metric"] not in metrics:
            raise InputError(f"{where}.metric={keys['metric']}: {suite.name} has {', '.join(metrics)}")
        lengths = keys["length"] if isinstance(keys["length"], list) else [keys["length"]]
        if not lengths or not all(type(length) is int and length >= 0 for length in lengths):
            raise InputError(f"{where}.length={keys['length']} should be a length in tokens, or a list of lengths")
        found.append(Measure(str(name), suite.name, str(keys["task"]), tuple(lengths), keys["metric"]))
    return tuple(found)


def read_choose(path: Path, axes: dict, average: tuple[str, ...], evaluation: dict, given: Any) -> Choose:
    """`{over, where, evaluation}`.  Raises InputError."""
    if not isinstance(given, dict) or not {"over", "evaluation"} <= set(given) <= {"over", "where", "evaluation"}:
        raise InputError(f"{path}: choose={given} should have over, evaluation and, where something is averaged, where")
    over, where = str(given["over"]), given.get("where") or {}
    if over not in axes or over in average:
        named = ", ".join(axis for axis in axes if axis not in average)
        raise InputError(f"{path}: choose.over={over} should be an axis that is not averaged over: {named}")
    for axis, level in where.items() if isinstance(where, dict) else [(where, None)]:
        if axis not in average or not isinstance(level, str) or level not in axes[axis]:
            raise InputError(
                f"{path}: choose.where: {axis}={level} should be a level of an axis that is averaged over "
                f"({', '.join(average) or 'average names none'})"
            )
    if not isinstance(given["evaluation"], dict) or all(
        evaluation.get(name) == value for name, value in given["evaluation"].items()
    ):
        raise InputError(
            f"{path}: choose.evaluation={given['evaluation']} should differ from evaluation, such as {{text: "
            "data/development}: what is chosen on the reported data looks better than it is"
        )
    return Choose(over, dict(where), evaluation | given["evaluation"])
