"""Reads what a run left in its directory, whatever of it is there, for the report."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from endprompt_megatron.errors import InputError
from endprompt_megatron.files import read_json

COVERAGE_SAMPLES = 256


@dataclass
class Run:
    """A run's files.  What is missing is empty or None."""

    directory: Path
    recipe: dict = field(default_factory=dict)
    recipe_text: str = ""
    steps: list[dict] = field(default_factory=list)
    validations: list[dict] = field(default_factory=list)
    seen: list[dict] = field(default_factory=list)  # of each source of the training data: data/seen.py
    evaluation: dict | None = None
    control: "Run | None" = None

    @property
    def name(self) -> str:
        return self.directory.resolve().name

    def value(self, key: str, default: object = None) -> object:
        """A dotted recipe key; `default` where the recipe does not have it."""
        node: object = self.recipe
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return default if node is None else node

    def final(self, key: str, over: int = 10) -> float | None:
        """Mean of a metric over the last `over` logged steps."""
        values = [line[key] for line in self.steps if isinstance(line.get(key), (int, float))][-over:]
        return float(np.mean(values)) if values else None


def read_run(directory: Path, control: Path | None = None) -> Run:
    """Everything the report shows.  Raises InputError if `directory` holds none of it, or a file is broken."""
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory; expected a RUN that extend.py wrote")
    run = Run(directory)
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
    results = directory / "evaluation" / "results.json"
    if results.is_file():
        run.evaluation = _results(results)
        _beside(run.evaluation, "untrained", directory / "untrained" / "evaluation" / "results.json")
    if not (run.recipe or run.steps or run.evaluation):
        raise InputError(
            f"{directory}: holds neither recipe.yaml nor metrics.jsonl nor evaluation/results.json; expected a RUN"
        )
    if control is not None:
        run.control = read_run(control)
        if run.evaluation is not None:
            _beside(run.evaluation, "control", control / "evaluation" / "results.json")
    return run


def _beside(evaluation: dict, label: str, path: Path) -> None:
    """Add another evaluation's extended model under `label`, where it measured the same inputs."""
    if not path.is_file():
        return
    other = _results(path)
    same = ("text", "lengths", "windows", "scored", "seed", "samples", "physical", "probe_samples", "filler", "depths")
    mine, theirs = evaluation.get("settings", {}), other.get("settings", {})
    if (evaluation.get("text") or {}).get("sha256") != (other.get("text") or {}).get("sha256") or any(
        mine.get(key) != theirs.get(key) for key in same if key != "text"
    ):
        evaluation.setdefault("left_out", []).append(f"{label}: {path} measured other inputs")
        return
    evaluation["measurements"][label] = other["measurements"]["extended"]
    evaluation["models"][label] = other["models"]["extended"]


def _results(path: Path) -> dict:
    value = read_json(path, "the results of evaluate.py")
    for key in ("models", "measurements"):
        if not isinstance(value.get(key), dict) or "extended" not in value[key]:
            raise InputError(f"{path}: no {key}.extended; expected the results of evaluate.py: run it again")
    return value


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


def distance_coverage(run: Run) -> tuple[np.ndarray, list[tuple[int, int]], int] | None:
    """Mean supervised pairs a sample by distance (float64 [L]), the gaps, and the prompt length used.

    None where the recipe does not say enough.  The prompt's length is read from the run's own tokenizer if that is
    still there; otherwise 12 tokens, about what EP_1 has.
    """
    from endprompt_megatron.config import recipe_of
    from endprompt_megatron.coverage import coverage_of
    from endprompt_megatron.positions import METHODS

    method, physical, target = (run.value(f"context.{key}") for key in ("method", "physical", "target"))
    if method not in METHODS or not isinstance(physical, int) or not isinstance(target, int):
        return None
    try:
        recipe = recipe_of(run.recipe)
    except InputError:
        return None
    try:
        found = coverage_of(recipe, samples=COVERAGE_SAMPLES)
    except (InputError, ImportError):
        found = coverage_of(recipe, samples=COVERAGE_SAMPLES, prompt_len=12)
    return found.counts, found.gaps, round(found.prompt)
