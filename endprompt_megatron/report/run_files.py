"""Reads what runs left in their directories, whatever of it is there, for the report."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.files import read_json
from endprompt_megatron.common.plotting import MAX_RUNS
from endprompt_megatron.config.keys import get

RESULTS = "results.json"


@dataclass
class Run:
    """A run's files.  What is missing is empty or None."""

    directory: Path
    name: str = ""
    recipe: dict = field(default_factory=dict)
    recipe_text: str = ""
    steps: list[dict] = field(default_factory=list)
    validations: list[dict] = field(default_factory=list)
    seen: list[dict] = field(default_factory=list)  # what training read of each source: data_seen.json
    evaluation: dict | None = None
    untrained: dict | None = None  # the evaluation of the same scaling without training

    def value(self, key: str, default: object = None) -> object:
        """A dotted recipe key; `default` where the recipe does not have it."""
        return get(self.recipe, key, default)

    def final(self, key: str, over: int = 10) -> float | None:
        """Mean of a metric over the last `over` logged steps."""
        values = [line[key] for line in self.steps if isinstance(line.get(key), (int, float))][-over:]
        return float(np.mean(values)) if values else None

    @property
    def trained(self) -> bool:
        """Whether there is anything of a training here, not of an evaluation alone."""
        return bool(self.recipe or self.steps)


@dataclass
class Runs:
    """What stands on one page: the runs asked for, in their order, and the control beside them."""

    runs: list[Run]
    control: Run | None = None

    @property
    def all(self) -> list[Run]:
        return [*self.runs, *([self.control] if self.control else [])]

    @property
    def several(self) -> bool:
        return len(self.runs) > 1


def read_runs(directories: list[Path], control: Path | None = None) -> Runs:
    """Everything of one page, each run under a name of its own.

    Raises InputError as read_run does, for a run named twice, and for more than can be told apart.
    """
    if len(directories) > MAX_RUNS:
        raise InputError(
            f"{directories[MAX_RUNS]}: {len(directories)} runs are too many for one page; name {MAX_RUNS} at most"
        )
    every = [*directories, *([control] if control else [])]
    places = [directory.resolve() for directory in every]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise InputError(f"{every[number]}: is named twice; name each RUN once, and the control only as --control")
    runs = [read_run(directory) for directory in every]
    names = [_name(place) for place in places]
    for run, name, place in zip(runs, names, places, strict=True):
        run.name = name if names.count(name) == 1 else f"{_name(place.parent)}/{name}"
    return Runs(runs[: len(directories)], runs[-1] if control else None)


def _name(place: Path) -> str:
    """What a directory is called; RUN/evaluation is called after its run."""
    return place.parent.name if place.name == "evaluation" and place.parent.name else place.name


def read_run(directory: Path) -> Run:
    """One RUN, or the --out of evaluate.py.  Raises InputError if it is neither, or a file is broken."""
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory; expected a RUN of extend.py, or the --out of evaluate.py")
    run = Run(directory, _name(directory.resolve()))
    recipe, metrics = directory / "recipe.yaml", directory / "metrics.jsonl"
    if recipe.is_file():
        run.recipe_text = recipe.read_text(encoding="utf-8", errors="replace")
        run.recipe = _yaml(recipe, run.recipe_text)
    if metrics.is_file():
        for line in _lines(metrics):
            if "valid_loss" in line:
                run.validations.append(line)
            elif "loss" in line:  # the rest is about the machine: slow ranks, damaged checkpoints
                run.steps.append(line)
    seen = directory / "data_seen.json"
    if seen.is_file():
        run.seen = read_json(seen, "what training read of each source").get("sources") or []
    run.evaluation = _first_results(directory / "evaluation" / RESULTS, directory / RESULTS)
    run.untrained = _first_results(directory / "untrained" / "evaluation" / RESULTS)
    if not (run.trained or run.evaluation):
        raise InputError(
            f"{directory}: holds neither recipe.yaml nor metrics.jsonl nor evaluation/results.json nor results.json; "
            "expected a RUN of extend.py, or the --out of evaluate.py"
        )
    return run


def _first_results(*paths: Path) -> dict | None:
    """The first of these files that is there."""
    for path in paths:
        if path.is_file():
            value = read_json(path, "the results of evaluate.py")
            for key in ("models", "measurements"):
                if not isinstance(value.get(key), dict) or "extended" not in value[key]:
                    raise InputError(f"{path}: no {key}.extended; expected the results of evaluate.py: run it again")
            return value
    return None


def _yaml(path: Path, text: str) -> dict:
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML ({' '.join(str(error).split())[:120]})") from None
    return value if isinstance(value, dict) else {}


def _lines(path: Path) -> list[dict]:
    """Objects of a .jsonl file.  A last line cut short by a kill is dropped; any other broken line is an error."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    result = []
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):
                break
            raise InputError(f"{path}: line {number} is not JSON; the file was changed by hand or is damaged") from None
        if isinstance(value, dict) and isinstance(value.get("step"), int):
            result.append(value)
    return result
