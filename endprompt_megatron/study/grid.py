"""study.yaml: a grid of named recipe overrides over one base recipe, and the trials that it makes.

A trial is one level of every axis, such as method=pose, rope=yarn, seed=2.  Its name joins the levels; without those of
axes that are averaged over (the seed, the base model) it is a variant, which tables show.  With `choose`, the levels of
one axis compete on development data, and a variant keeps one of them (choice.py).  Every trained trial consumes the
same tokens, within a global batch.  No torch: whatever is wrong here shows at once.
"""

import itertools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.config.recipe import Recipe
from endprompt_megatron.config.resolve import load_resolved
from endprompt_megatron.evaluate.registry import option_names, parse_suites
from endprompt_megatron.study.choice import Choose, Measure, read_choose, read_measures

SEED = "seed"  # the axis that is averaged over where `average` names no other
KEEP = ("all", "scores")
_KEYS = {
    *("base", "out", "title", "about", "overrides", "axes", "average", "exclude", "untrained", "evaluation"),
    *("choose", "measures", "contrasts", "equivalent", "reference", "keep", "processes", "parallel"),
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.]*")


@dataclass(frozen=True)
class Trial:
    """One run and its evaluation.  `recipe` is as resolved; None: the base model as it is."""

    name: str
    variant: str
    levels: dict[str, str]
    recipe: Recipe | None
    trained: bool
    model: Path  # the base model's Hugging Face directory

    @property
    def tokens(self) -> int:
        """Physical tokens that training consumes."""
        return self.recipe.train.steps * self.recipe.tokens_per_step if self.trained else 0


@dataclass(frozen=True)
class Study:
    """A study.yaml as read."""

    path: Path
    out: Path
    title: str
    about: str
    trials: list[Trial]
    evaluation: dict[str, Any]  # options of tools/evaluate.py by name
    reference: str | None  # the variant that others are compared with
    keep: str
    processes: int
    parallel: int
    axes: dict[str, list[str]] = field(default_factory=dict)
    average: tuple[str, ...] = (SEED,)  # axes, the outer ones first
    choose: Choose | None = None
    measures: tuple[Measure, ...] = ()
    contrasts: tuple[tuple[str, str], ...] = ()  # pairs of variants, named before the runs
    equivalent: float = 0.0  # the largest difference that does not matter, in the unit of the tables

    def directory(self, trial: Trial) -> Path:
        """Where the trial's recipe, run, model and evaluation are."""
        return trial_directory(self.out, trial.name)

    @property
    def variants(self) -> list[str]:
        """Names of variants, in order: the untrained ones first."""
        return list(dict.fromkeys(trial.variant for trial in self.trials))

    def chosen(self, names: list[str]) -> list[Trial]:
        """The trials of these names or variants, all without any.  Raises InputError for an unknown name."""
        known = {trial.name for trial in self.trials} | set(self.variants)
        for name in names:
            if name not in known:
                raise InputError(
                    f"--only {name}: no such trial or variant; the trials are {', '.join(c.name for c in self.trials)}"
                )
        return [trial for trial in self.trials if not names or trial.name in names or trial.variant in names]


def trial_directory(out: Path, name: str) -> Path:
    """STUDY/cells/NAME."""
    return out / "cells" / name


def read_study(path: Path) -> Study:
    """Raises InputError for a file, key, level or recipe that cannot be right, and for unequal token budgets."""
    given = _yaml(path)
    for key in given:
        if key not in _KEYS:
            raise InputError(f"{path}: unknown key {key}; a study takes {', '.join(sorted(_KEYS))}")
    base = path.parent / _text(path, given, "base", None)
    out = Path(_text(path, given, "out", None))
    keep = given.get("keep", "all")
    if keep not in KEEP:
        raise InputError(f"{path}: keep={keep} should be one of {', '.join(KEEP)}")
    numbers = {}
    for key in ("processes", "parallel"):
        numbers[key] = given.get(key, 1)
        if type(numbers[key]) is not int or numbers[key] < 1:
            raise InputError(f"{path}: {key}={numbers[key]} should be a whole number, at least 1")
    shared = overrides_of(path, "overrides", given.get("overrides") or {})
    axes = _axes(path, given.get("axes"))
    average = _average(path, axes, given.get("average"))
    evaluation = evaluation_of(path, given.get("evaluation"))
    choose, measures = None, read_measures(path, given.get("measures") or {})
    for key in ("choose", "contrasts"):
        if given.get(key) and not measures:
            raise InputError(f"{path}: {key} requires measures, what the study is judged by")
    if given.get("choose"):
        choose = read_choose(path, axes, average, evaluation, given["choose"])
        evaluation_of(path, choose.evaluation, "choose.evaluation")
    apart = [*average, *([choose.over] if choose else [])]  # axes that do not make a variant
    trials = _untrained(path, base, out, shared, axes, average, given.get("untrained") or {})
    trials += _grid(path, base, out, shared, axes, apart, _excluded(path, axes, given.get("exclude") or []))
    _refuse_untried(path, trials, choose)
    names = [trial.name for trial in trials]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{path}: two trials are named {name}; rename a level or an untrained model")
    study = Study(
        path=path,
        out=out,
        title=_text(path, given, "title", path.stem),
        about=_text(path, given, "about", ""),
        trials=trials,
        evaluation=evaluation,
        reference=_text(path, given, "reference", "") or None,
        keep=keep,
        axes={axis: list(levels) for axis, levels in axes.items()},
        average=average,
        choose=choose,
        measures=measures,
        contrasts=_contrasts(path, given.get("contrasts") or [], [trial.variant for trial in trials]),
        equivalent=_positive(path, "equivalent", given.get("equivalent", 0)),
        **numbers,
    )
    if study.reference is not None and study.reference not in study.variants:
        raise InputError(
            f"{path}: reference={study.reference} is not a variant; choose from {', '.join(study.variants)}"
        )
    refuse_unequal(path, trials)
    return study


def _yaml(path: Path) -> dict:
    import yaml

    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such study") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: a study is a mapping with {', '.join(sorted(_KEYS))}")
    return value


def _text(path: Path, given: dict, key: str, default: str | None) -> str:
    value = given.get(key, default)
    if value is None:
        raise InputError(f"{path}: {key} is missing")
    if not isinstance(value, str):
        raise InputError(f"{path}: {key}={value} should be text")
    return value


def overrides_of(path: Path, where: str, given: Any) -> list[str]:
    """`key=value` of a mapping of dotted recipe keys.  Raises InputError."""
    if not isinstance(given, dict):
        raise InputError(f"{path}: {where}={given} should be recipe keys with values, such as {{context.method: pose}}")
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in given.items()]


def _named(path: Path, where: str, given: Any) -> dict[str, Any]:
    """A mapping whose keys can be part of a directory's name.  Raises InputError."""
    if not isinstance(given, dict):
        raise InputError(f"{path}: {where}={given} should be a mapping from names to recipe keys")
    for name in given:
        if not _NAME.fullmatch(str(name)):
            raise InputError(f"{path}: {where}.{name}: a name may contain only letters, digits, _ and .")
    return {str(name): value for name, value in given.items()}


def _axes(path: Path, given: Any) -> dict[str, dict[str, list[str]]]:
    """Overrides by level by axis; `seed: [1, 2]` is shorthand for the levels seed1 and seed2."""
    if not given:
        raise InputError(f"{path}: axes is missing; give for example {{method: {{short: {{context.method: short}}}}}}")
    axes = {}
    for axis, levels in _named(path, "axes", given).items():
        if axis == SEED and isinstance(levels, list):
            levels = {f"seed{seed}": {"train.seed": seed} for seed in levels}
        levels = _named(path, f"axes.{axis}", levels)
        if not levels:
            raise InputError(f"{path}: axes.{axis} has no level")
        axes[axis] = {name: overrides_of(path, f"axes.{axis}.{name}", keys or {}) for name, keys in levels.items()}
    return axes


def _excluded(path: Path, axes: dict, given: Any) -> list[dict[str, list[str]]]:
    found = []
    for number, rule in enumerate(given if isinstance(given, list) else [given]):
        if not isinstance(rule, dict) or not rule:
            raise InputError(f"{path}: exclude={rule} should be levels by axis, such as {{method: full, rope: yarn}}")
        levels = {axis: value if isinstance(value, list) else [value] for axis, value in rule.items()}
        for axis, names in levels.items():
            for name in names:
                if name not in axes.get(axis, {}):
                    raise InputError(f"{path}: exclude[{number}]: axis {axis} has no level {name}")
        found.append(levels)
    return found


def _average(path: Path, axes: dict, given: Any) -> tuple[str, ...]:
    """The axes that tables average over.  Raises InputError."""
    if given is None:
        return (SEED,) if SEED in axes else ()
    names = [str(name) for name in (given if isinstance(given, list) else [given])]
    for name in names:
        if name not in axes:
            raise InputError(f"{path}: average={name} is not an axis; choose from {', '.join(axes)}")
    return tuple(names)


def _refuse_untried(path: Path, trials: list[Trial], choose: Choose | None) -> None:
    """Raise InputError for a variant whose trials are all elsewhere than where the choice is made."""
    tried = {trial.variant for trial in trials if choose and choose.is_tried(trial.levels)}
    for variant in dict.fromkeys(trial.variant for trial in trials if choose and trial.trained):
        if variant not in tried:
            raise InputError(
                f"{path}: choose.where={choose.where}: exclude leaves no trial of {variant} to choose from"
            )


def _positive(path: Path, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise InputError(f"{path}: {key}={value} should be a number, at least 0")
    return float(value)


def _contrasts(path: Path, given: Any, variants: list[str]) -> tuple[tuple[str, str], ...]:
    """Pairs of variants.  Raises InputError."""
    if not isinstance(given, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in given):
        raise InputError(f"{path}: contrasts={given} should be pairs of variants, such as [[end_prompt, short]]")
    for name in (name for pair in given for name in pair):
        if name not in variants:
            raise InputError(
                f"{path}: contrasts: {name} is not a variant; choose from {', '.join(dict.fromkeys(variants))}"
            )
    return tuple((first, second) for first, second in given)


def _untrained(
    path: Path, base: Path, out: Path, shared: list[str], axes: dict, average: tuple[str, ...], given: Any
) -> list[Trial]:
    """The models that are only measured: null, the base as it is; recipe keys, its RoPE scaled as they say.

    One of each for every base model among the levels that are averaged over.
    """
    of_models = [
        axis for axis in average if any(key.startswith("model.") for keys in axes[axis].values() for key in keys)
    ]
    trials = []
    for combination in itertools.product(*(axes[axis] for axis in of_models)):
        levels = dict(zip(of_models, combination, strict=True))
        chosen = [override for axis, level in levels.items() for override in axes[axis][level]]
        for variant, keys in _named(path, "untrained", given).items():
            name = "-".join([variant, *combination])
            own = [] if keys is None else overrides_of(path, f"untrained.{variant}", keys)
            recipe = _recipe(path, name, base, out, [*shared, *chosen, *own])
            model = Path(recipe.model.hf)
            trials.append(Trial(name, variant, levels, None if keys is None else recipe, trained=False, model=model))
    return trials


def _grid(
    path: Path, base: Path, out: Path, shared: list[str], axes: dict, apart: list[str], excluded: list
) -> list[Trial]:
    """All combinations, one seed after the other, so that a part of the grid already compares all variants.

    `apart`: axes whose levels a variant has all of.
    """
    order = [axis for axis in reversed(axes) if axis in apart] + [axis for axis in axes if axis not in apart]
    trials = []
    for combination in itertools.product(*(axes[axis] for axis in order)):
        chosen = dict(zip(order, combination, strict=True))
        levels = {axis: chosen[axis] for axis in axes}
        if any(all(levels[axis] in names for axis, names in rule.items()) for rule in excluded):
            continue
        name = "-".join(levels.values())
        variant = "-".join(level for axis, level in levels.items() if axis not in apart) or "all"
        own = [override for axis, level in levels.items() for override in axes[axis][level]]
        recipe = _recipe(path, name, base, out, [*shared, *own])
        trials.append(Trial(name, variant, levels, recipe, trained=True, model=Path(recipe.model.hf)))
    if not trials:
        raise InputError(f"{path}: exclude leaves no trial")
    return trials


def _recipe(path: Path, name: str, base: Path, out: Path, overrides: list[str]) -> Recipe:
    try:
        return load_resolved(base, [*overrides, f"checkpoint.dir={trial_directory(out, name) / 'run'}"])
    except InputError as error:
        raise InputError(f"{path}: trial {name}: {error}") from None


def evaluation_of(path: Path, given: Any, where: str = "evaluation") -> dict[str, Any]:
    """Options of tools/evaluate.py by name.  Raises InputError for one that it does not have."""
    if not isinstance(given, dict) or not given.get("lengths") or not given.get("suite"):
        raise InputError(f"{path}: {where} requires suite and lengths, as tools/evaluate.py takes them")
    named = {str(name).replace("-", "_"): value for name, value in given.items()}
    known = {*option_names(), "suite", "threads"}
    for name in named:
        if name not in known:
            options = ", ".join(sorted(known))
            raise InputError(f"{path}: {where}.{name}: tools/evaluate.py has no such option; choose from {options}")
    try:
        parse_suites(option_text(named["suite"]))
    except InputError as error:
        raise InputError(f"{path}: {where}: {error}") from None
    return named


def option_text(value: Any) -> str:
    """An option's value as the command line takes it: lists with commas."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def refuse_unequal(path: Path, trials: list[Trial]) -> None:
    """Raise InputError unless all trained trials consume the same tokens, within one global batch."""
    trained = sorted((trial for trial in trials if trial.trained), key=lambda trial: trial.tokens)
    fewest, most = trained[0], trained[-1]
    batch = max(trial.recipe.tokens_per_step for trial in trained)
    if most.tokens - fewest.tokens >= batch:
        raise InputError(
            f"{path}: trials do not consume the same tokens: {fewest.name} {fewest.tokens:,}, "
            f"{most.name} {most.tokens:,}, a global batch ({batch:,}) or more apart; "
            "set train.tokens once, in the base recipe"
        )
