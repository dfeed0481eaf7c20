"""study.yaml: a grid of named recipe overrides over one base recipe, and the cells that it makes.

A cell is one level of every axis, such as method=pose, rope=yarn, seed=2.  Its name joins the levels; without the
seed that is its row, what tables show.  Every trained cell consumes the same tokens, within a global batch.
No torch: whatever is wrong here shows at once.
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
from endprompt_megatron.evaluate.settings import Settings, parse_suites

OVER = "seed"  # the axis that is averaged over
KEEP = ("all", "scores")
_KEYS = {
    *("base", "out", "title", "about", "overrides", "axes", "exclude", "untrained", "evaluation", "reference"),
    *("keep", "processes", "parallel"),
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.]*")
_OPTIONS = {*(set(Settings.__dataclass_fields__) - {"suites"}), "suite", "threads"}  # of tools/evaluate.py


@dataclass(frozen=True)
class Cell:
    """One run and its evaluation.  `recipe` is as resolved; None: the base model as it is."""

    name: str
    row: str
    levels: dict[str, str]
    recipe: Recipe | None
    trained: bool

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
    model: Path  # the base model's Hugging Face directory
    cells: list[Cell]
    evaluation: dict[str, Any]  # options of tools/evaluate.py by name
    reference: str | None  # the row that others are compared with
    keep: str
    processes: int
    parallel: int
    axes: dict[str, list[str]] = field(default_factory=dict)

    def directory(self, cell: Cell) -> Path:
        """Where the cell's recipe, run, model and evaluation are."""
        return cell_directory(self.out, cell.name)

    @property
    def rows(self) -> list[str]:
        """Names of rows, in order: the untrained ones first."""
        return list(dict.fromkeys(cell.row for cell in self.cells))

    def chosen(self, names: list[str]) -> list[Cell]:
        """The cells of these names or rows, all without any.  Raises InputError for an unknown name."""
        known = {cell.name for cell in self.cells} | set(self.rows)
        for name in names:
            if name not in known:
                raise InputError(f"--only {name}: no such cell; there are {', '.join(c.name for c in self.cells)}")
        return [cell for cell in self.cells if not names or cell.name in names or cell.row in names]


def cell_directory(out: Path, name: str) -> Path:
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
            raise InputError(f"{path}: {key}={numbers[key]} should be a number, at least 1")
    shared = overrides_of(path, "overrides", given.get("overrides") or {})
    axes = _axes(path, given.get("axes"))
    cells = _untrained(path, base, out, shared, given.get("untrained") or {})
    cells += _grid(path, base, out, shared, axes, _excluded(path, axes, given.get("exclude") or []))
    names = [cell.name for cell in cells]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{path}: two cells are named {name}; rename a level or an untrained model")
    model = load_resolved(base, [*shared, f"checkpoint.dir={out}"]).model.hf
    study = Study(
        path=path,
        out=out,
        title=_text(path, given, "title", path.stem),
        about=_text(path, given, "about", ""),
        model=Path(model),
        cells=cells,
        evaluation=_evaluation(path, given.get("evaluation")),
        reference=_text(path, given, "reference", "") or None,
        keep=keep,
        axes={axis: list(levels) for axis, levels in axes.items()},
        **numbers,
    )
    if study.reference is not None and study.reference not in study.rows:
        raise InputError(f"{path}: reference={study.reference} is no row; there are {', '.join(study.rows)}")
    refuse_unequal(path, cells)
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
        raise InputError(f"{path}: {key}={value} should be a text")
    return value


def overrides_of(path: Path, where: str, given: Any) -> list[str]:
    """`key=value` of a mapping of dotted recipe keys.  Raises InputError."""
    if not isinstance(given, dict):
        raise InputError(f"{path}: {where}={given} should be recipe keys with values, such as {{context.method: pose}}")
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in given.items()]


def _named(path: Path, where: str, given: Any) -> dict[str, Any]:
    """A mapping whose keys can be a part of a directory's name.  Raises InputError."""
    if not isinstance(given, dict):
        raise InputError(f"{path}: {where}={given} should be a mapping from names to recipe keys")
    for name in given:
        if not _NAME.fullmatch(str(name)):
            raise InputError(f"{path}: {where}.{name}: a name has letters, digits, _ and . only")
    return {str(name): value for name, value in given.items()}


def _axes(path: Path, given: Any) -> dict[str, dict[str, list[str]]]:
    """Overrides by level by axis; `seed: [1, 2]` is short for levels seed1 and seed2."""
    if not given:
        raise InputError(f"{path}: axes is missing; give for example {{method: {{short: {{context.method: short}}}}}}")
    axes = {}
    for axis, levels in _named(path, "axes", given).items():
        if axis == OVER and isinstance(levels, list):
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


def _untrained(path: Path, base: Path, out: Path, shared: list[str], given: Any) -> list[Cell]:
    """The models that are only measured: null, the base as it is; recipe keys, its RoPE scaled as they say."""
    cells = []
    for name, keys in _named(path, "untrained", given).items():
        own = None if keys is None else overrides_of(path, f"untrained.{name}", keys)
        recipe = None if own is None else _recipe(path, name, base, out, [*shared, *own])
        cells.append(Cell(name, name, {}, recipe, trained=False))
    return cells


def _grid(path: Path, base: Path, out: Path, shared: list[str], axes: dict, excluded: list) -> list[Cell]:
    """All combinations, one seed after the other, so that a part of the grid already compares all rows."""
    order = [OVER] * (OVER in axes) + [axis for axis in axes if axis != OVER]
    cells = []
    for combination in itertools.product(*(axes[axis] for axis in order)):
        chosen = dict(zip(order, combination, strict=True))
        levels = {axis: chosen[axis] for axis in axes}
        if any(all(levels[axis] in names for axis, names in rule.items()) for rule in excluded):
            continue
        name = "-".join(levels.values())
        row = "-".join(level for axis, level in levels.items() if axis != OVER) or "all"
        own = [override for axis, level in levels.items() for override in axes[axis][level]]
        cells.append(Cell(name, row, levels, _recipe(path, name, base, out, [*shared, *own]), trained=True))
    if not cells:
        raise InputError(f"{path}: exclude leaves no cell")
    return cells


def _recipe(path: Path, name: str, base: Path, out: Path, overrides: list[str]) -> Recipe:
    try:
        return load_resolved(base, [*overrides, f"checkpoint.dir={cell_directory(out, name) / 'run'}"])
    except InputError as error:
        raise InputError(f"{path}: cell {name}: {error}") from None


def _evaluation(path: Path, given: Any) -> dict[str, Any]:
    """Options of tools/evaluate.py by name.  Raises InputError for one that it does not have."""
    if not isinstance(given, dict) or not given.get("lengths") or not given.get("suite"):
        raise InputError(f"{path}: evaluation needs suite and lengths, as tools/evaluate.py has them")
    named = {str(name).replace("-", "_"): value for name, value in given.items()}
    for name in named:
        if name not in _OPTIONS:
            raise InputError(f"{path}: evaluation.{name}: no such option; there are {', '.join(sorted(_OPTIONS))}")
    try:
        parse_suites(option_text(named["suite"]))
    except InputError as error:
        raise InputError(f"{path}: evaluation: {error}") from None
    return named


def option_text(value: Any) -> str:
    """An option's value as the command line has it: lists with commas."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def refuse_unequal(path: Path, cells: list[Cell]) -> None:
    """Raise InputError unless all trained cells consume the same tokens, within one global batch."""
    trained = sorted((cell for cell in cells if cell.trained), key=lambda cell: cell.tokens)
    least, most = trained[0], trained[-1]
    batch = max(cell.recipe.tokens_per_step for cell in trained)
    if most.tokens - least.tokens >= batch:
        raise InputError(
            f"{path}: cells do not get the same tokens: {least.name} {least.tokens:,}, {most.name} {most.tokens:,}, "
            f"a global batch ({batch:,}) or more apart; give train.tokens once, in the base recipe"
        )
