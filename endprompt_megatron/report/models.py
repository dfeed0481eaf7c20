"""The models that a page has measurements of, side by side, and which of them were evaluated on the same inputs.

The order of the columns of every table: what was there before, interpolated and untrained, the control, the runs.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePath

from endprompt_megatron.evaluate.intervals import compare_intervals
from endprompt_megatron.evaluate.registry import BASELINE, EXTENDED, SUITES, Key, Settings, Suite, differing_inputs
from endprompt_megatron.report.run_files import Run, Runs


@dataclass
class Model:
    """A column.  `key` is also its CSS class and the name of its colour."""

    key: str
    name: str
    run: Run
    results: dict  # results.json of the evaluation that measured it
    label: str  # under which it is in there
    measured: dict = field(default_factory=dict)  # suite -> what it measured
    sources: dict[str, dict] = field(default_factory=dict)  # suite -> the results.json that it is from
    scores: dict[Key, dict] = field(default_factory=dict)
    against: dict[Key, dict] = field(default_factory=dict)  # comparisons with its baseline

    def settings(self, suite: Suite) -> Settings:
        """The settings of the evaluation that measured the suite."""
        return Settings.of(self.sources[suite.name].get("settings") or {})

    @property
    def about(self) -> dict:
        """What the engine said of it: path, window and the like."""
        return self.results["models"].get(self.label) or {}

    @property
    def path(self) -> str:
        return str(self.about.get("path", ""))

    @property
    def origin(self) -> str:
        """The name of the model that was extended, as far as the files tell."""
        base = (self.results["models"].get(BASELINE) or {}).get("path")
        return PurePath(str(self.run.value("model.hf") or base or self.path or "unknown")).name


@dataclass
class Measured:
    """The models of a page, and of each suite those that can stand in one table."""

    models: list[Model]
    control: Model | None = None

    def of(self, suite: Suite) -> list[Model]:
        """The models with the inputs of the first run, of those that the suite was run on."""
        there = [model for model in self.models if suite.name in model.measured]
        first = self._reference(suite)
        return [model for model in there if not _differing(suite, model, first)]

    def left_out(self, suite: Suite) -> list[str]:
        """Why a model is not in the table, a sentence each."""
        first, found = self._reference(suite), []
        for model in self.models:
            differing = _differing(suite, model, first) if suite.name in model.measured else []
            if differing:
                names = ", ".join(differing)
                found.append(f"Left out: {model.name} measured other inputs than {first.name} ({names}).")
        return found

    def as_results(self, suite: Suite) -> dict:
        """The models of a suite in the form of results.json, keys in the place of labels, for the suite's drawings."""
        models = self.of(suite)
        return {
            "models": {model.key: model.about for model in models},
            "measurements": {model.key: {suite.name: model.measured[suite.name]} for model in models},
            "scores": {model.key: list(model.scores.values()) for model in models},
        }

    def _reference(self, suite: Suite) -> Model | None:
        there = [model for model in self.models if suite.name in model.measured]
        return next((model for model in there if model.key == "extended"), there[-1] if there else None)


def measured_models(runs: Runs) -> Measured:
    """Every model that an evaluation of these runs measured; equal baselines stand once."""
    before: list[Model] = []
    beside: list[Model] = []
    own: list[Model] = []
    control = None
    for number, run in enumerate(runs.all):
        if run.evaluation is None:
            continue
        base = _model("baseline", "before", run, run.evaluation, BASELINE)
        same = next((other for other in before if base and _same(other, base)), None)
        if same is not None:
            for suite, value in base.measured.items():
                same.measured.setdefault(suite, value)
                same.sources.setdefault(suite, base.results)
            same.scores = base.scores | same.scores
        elif base is not None:
            before.append(base)
        if run is runs.control:
            control = _model("control", "control", run, run.evaluation, EXTENDED)
            beside.append(control)
            continue
        if run.untrained is not None and not beside:
            beside.append(_model("untrained", "interpolated, untrained", run, run.untrained, EXTENDED))
        key = "extended" if number == 0 else f"run{number + 1}"
        own.append(_model(key, run.name if runs.several else "extended", run, run.evaluation, EXTENDED))
    for number, model in enumerate(before[1:], start=2):
        model.key, model.name = f"baseline{number}", f"before {model.run.name}"
    return Measured([*before, *beside, *own], control)


def _model(key: str, name: str, run: Run, results: dict, label: str) -> Model | None:
    if label not in results["measurements"]:
        return None
    found = Model(key, name, run, results, label)
    found.measured = {suite: value for suite, value in results["measurements"][label].items() if suite in SUITES}
    found.sources = dict.fromkeys(found.measured, results)
    found.scores = _by_key((results.get("scores") or {}).get(label) or [])
    if label == EXTENDED:
        found.against = _by_key(results.get("comparisons") or [])
    return found


def _by_key(rows: Iterable[dict]) -> dict[Key, dict]:
    return {(row["suite"], row["task"], row["length"], row["metric"]): row for row in rows if row["suite"] in SUITES}


def _same(one: Model, other: Model) -> bool:
    """Whether two baselines are one model that gave the same where both were measured."""
    both = one.measured.keys() & other.measured.keys()
    return one.path == other.path and all(one.measured[suite] == other.measured[suite] for suite in both)


def _differing(suite: Suite, model: Model, reference: Model | None) -> list[str]:
    """Names of what made other inputs of a suite."""
    if reference is None or model is reference:
        return []
    return differing_inputs(suite, *((each.sources[suite.name], each.label) for each in (model, reference)))


def against_control(model: Model, control: Model) -> dict[Key, dict]:
    """What differs between a run and the control, as far as their intervals say."""
    found, both = {}, model.measured.keys() & control.measured.keys()
    for key, score in model.scores.items():
        other = control.scores.get(key) if key[0] in both else None
        compared = compare_intervals(other, score) if other else None
        if compared is not None and not _differing(SUITES[key[0]], model, control):
            found[key] = {name: score[name] for name in ("suite", "task", "length", "metric")} | compared
    return found
