"""A pilot before the bill: which RoPE scaling, learning rate and method to take, measured on the user's own model.

Two studies in one directory.  The first asks the base model and its untrained scalings; the second trains the best of
these for a few steps at several learning rates, with the recipe's method and with `short`, its control.  Everything is
read off one input a sample (the recall suite's facts and passage, at several lengths), so that a model costs one
reading.  Killed at any moment, the same command goes on.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from endprompt_megatron.common.errors import EXIT_DONE, InputError
from endprompt_megatron.common.files import disk_errors, write_json, write_text
from endprompt_megatron.common.text_table import text_table
from endprompt_megatron.config.recipe import Recipe
from endprompt_megatron.config.resolve import load_resolved
from endprompt_megatron.data.indexed import path_of
from endprompt_megatron.study.grid import read_study

BASE, CONTROL = "base", "short"
KEPT = 0.05  # nats inside the window that a longer one may cost
TYPES = ("linear", "ntk", "yarn")
RATES = (2e-5, 1e-4)


@dataclass(frozen=True)
class Asked:
    """What a pilot is asked to try, and on which text."""

    recipe: Path
    overrides: tuple[str, ...]
    out: Path
    text: Path
    types: tuple[str, ...] = TYPES
    rates: tuple[float, ...] = RATES
    tokens: int = 16384  # of each training
    samples: int = 1  # inputs that a model reads
    passage: int = 512  # tokens whose loss is taken behind each length
    lengths: tuple[int, ...] = ()
    distances: tuple[int, ...] = ()
    form: Path | None = None
    processes: int = 1
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Row:
    """One model's measurements by length: loss of the passage in nats, share of facts recalled."""

    name: str
    trained: bool
    loss: dict[int, float]
    recalled: dict[int, float]

    def beyond(self, window: int) -> float:
        """Mean share of facts recalled in inputs longer than `window`."""
        found = [share for length, share in self.recalled.items() if length > window]
        return sum(found) / len(found)

    def lost(self, base: "Row", window: int) -> float:
        """By how much the passage's loss rose inside the window, where most: nats."""
        return max(self.loss[length] - base.loss[length] for length in self.loss if length <= window)


def plain(rate: float) -> str:
    """A learning rate without an exponent, whose sign no trial's name may have."""
    return f"{rate:.12f}".rstrip("0")


def lengths_for(window: int, target: int) -> tuple[int, ...]:
    """Half the window, the window, half as much again, and the target."""
    return tuple(sorted({window // 2, window, *(n for n in (window * 3 // 2, target) if window < n <= target)}))


def distances_for(lengths: Sequence[int]) -> tuple[int, ...]:
    """Odd multiples of an eighth of the shortest length, so that no fact stands where an input ends; the farthest too.

    Facts that two lengths ask for at the same place are one fact.
    """
    unit = lengths[0] // 8
    odd = {2**power - 1 for power in range(1, 64) if (2**power - 1) * unit < lengths[-1]}
    return tuple(unit * count for count in sorted(odd | {length // unit - 1 | 1 for length in lengths}))


def run(asked: Asked) -> int:
    """Run what is missing of both studies, print the table and what it says; the exit code.  Raises InputError."""
    recipe = load_resolved(asked.recipe, [*asked.overrides, f"checkpoint.dir={asked.out}"])
    window, target = recipe.context.original, recipe.context.target
    if target <= window:
        raise InputError(
            f"{asked.recipe}: context.target={target} is not above the model's window of {window}: nothing to extend"
        )
    lengths = asked.lengths or lengths_for(window, target)
    if lengths[0] > window or lengths[-1] <= window:
        raise InputError(
            f"--lengths {','.join(map(str, lengths))}: should begin inside the window of {window} tokens and end beyond"
        )
    if not asked.text.is_file() and not path_of(asked.text, ".bin").is_file():
        raise InputError(f"--text {asked.text}: no such file, and no prepared dataset with that PREFIX")
    with disk_errors(asked.out, "--out"):
        asked.out.mkdir(parents=True, exist_ok=True)
    scalings = {name: {"context.rope.type": name} for name in asked.types}
    code, rows = _measure(asked, recipe, lengths, scalings, {})
    if code != EXIT_DONE:
        return code
    best = best_scaling(rows, window)
    methods = dict.fromkeys((recipe.context.method, CONTROL))
    trained = {
        f"{method}_lr{plain(rate)}": {"context.rope.type": best.name, "context.method": method, "optim.lr": rate}
        for rate in asked.rates
        for method in methods
    }
    code, rows = _measure(asked, recipe, lengths, scalings, trained)
    if code != EXIT_DONE:
        return code
    chosen, reason = recommend(rows, window)
    keys = {**scalings, **trained}.get(chosen.name, {})
    table = as_text(rows, window)
    print(f"\n{table}\n\n{reason}")
    if keys:
        print("  " + " ".join(f"{key}={value}" for key, value in keys.items()))
    found = [{"name": r.name, "trained": r.trained, "loss": r.loss, "recalled": r.recalled} for r in rows]
    results = {"format": 1, "window": window, "target": target, "rows": found, "chosen": chosen.name, "keys": keys}
    write_json(asked.out / "pilot.json", results | {"reason": reason})
    write_text(asked.out / "pilot.txt", f"{table}\n\n{reason}\n")
    return EXIT_DONE


def _measure(
    asked: Asked, recipe: Recipe, lengths: Sequence[int], untrained: dict[str, dict], trained: dict[str, dict]
) -> tuple[int, list[Row]]:
    """Run what is missing of the study of these models; its exit code, and its rows if that is 0."""
    from endprompt_megatron.study.compare import compare
    from endprompt_megatron.study.runner import run as run_trials

    path = asked.out / "study.yaml"
    write_text(path, json.dumps(study_of(asked, recipe, lengths, untrained, trained), indent=2) + "\n")
    study = read_study(path)
    wanted = [trial for trial in study.trials if trained or not trial.trained]
    code = run_trials(study, wanted)
    if code != EXIT_DONE:
        return code, []
    return code, [row_of(each) for each in compare(study)["rows"]]


def study_of(
    asked: Asked, recipe: Recipe, lengths: Sequence[int], untrained: dict[str, dict], trained: dict[str, dict]
) -> dict:
    """study.yaml as data.  Without `trained` it has the recipe itself as a trial, which is not to be run."""
    steps = max(1, asked.tokens // recipe.tokens_per_step)
    budget = {
        "train.tokens": steps * recipe.tokens_per_step,
        "train.valid_interval": 0,
        "data.valid": None,
        "optim.warmup_steps": min(recipe.optim.warmup_steps, steps // 10),
        "checkpoint.interval": max(1, steps // 2),
        "checkpoint.keep": 1,
        "checkpoint.export_every": 0,
    }
    given = dict(override.split("=", 1) for override in asked.overrides)
    evaluation = {
        "suite": ["recall"],
        "lengths": list(lengths),
        "text": str(asked.text),
        "samples": asked.samples,
        "recall_together": True,
        "recall_passage": asked.passage,
        "recall_distances": list(asked.distances or distances_for(lengths)),
        "beyond_window": True,
        "dtype": asked.dtype,
    }
    if asked.form:
        evaluation["recall_form"] = str(asked.form)
    return {
        "base": str(asked.recipe.resolve()),
        "out": str(asked.out),
        "title": "A pilot",
        "overrides": {**given, **budget},
        "axes": {"trial": trained or {"recipe": {}}},
        "untrained": {BASE: None, **untrained},
        "evaluation": evaluation,
        "keep": "scores",
        "processes": asked.processes,
    }


def row_of(variant: dict) -> Row:
    """A row of study.json."""
    by_task: dict[str, dict[int, float]] = {"passage": {}, "all distances": {}}
    for score in variant["scores"]:
        if (score["task"], score["metric"]) in (("passage", "loss"), ("all distances", "recalled")):
            by_task[score["task"]][score["length"]] = score["mean"]
    return Row(variant["name"], variant["trained"], by_task["passage"], by_task["all distances"])


def best_scaling(rows: Sequence[Row], window: int) -> Row:
    """The untrained scaling that recalls most beyond the window; of equals, that with the lowest loss at the target."""
    scaled = [row for row in rows if not row.trained and row.name != BASE]
    return max(scaled, key=lambda row: (row.beyond(window), -row.loss[max(row.loss)]))


def recommend(rows: Sequence[Row], window: int) -> tuple[Row, str]:
    """The model to take, and why in a sentence or two.

    Of those whose loss inside the window rises by no more than KEPT, if there are any, the one that recalls most
    beyond it; of equals, that with the lowest loss at the target.
    """
    (base,) = (row for row in rows if row.name == BASE)
    others = [row for row in rows if row is not base]
    kept = [row for row in others if row.lost(base, window) <= KEPT]
    longest = max(base.loss)
    if kept:
        chosen = max(kept, key=lambda row: (row.beyond(window), -row.loss[longest]))
        inside = f"costs {chosen.lost(base, window):+.3f} nats inside the window"
    else:
        chosen = min(others, key=lambda row: row.lost(base, window))
        inside = f"costs least inside the window, yet {chosen.lost(base, window):+.3f} nats, more than {KEPT}"
    said = (
        f"{chosen.name}: {inside} and recalls {chosen.beyond(window):.0%} beyond it (base: {base.beyond(window):.0%})."
    )
    if not chosen.trained:
        return chosen, f"{said} No training of this length improved on scaling the positions alone."
    control = chosen.name.startswith(f"{CONTROL}_lr")
    verdict = "The control did best: no gain is attributable to the method." if control else ""
    return chosen, f"{said} {verdict}".rstrip()


def as_text(rows: Sequence[Row], window: int) -> str:
    """The table: loss of the passage and facts recalled by length; a rule after the window's own."""
    lengths = sorted(rows[0].loss)
    header = ["model", *(f"loss {n:,}" for n in lengths), *(f"recalled {n:,}" for n in lengths)]
    body = [
        [
            row.name + ("" if row.trained or row.name == BASE else ", untrained"),
            *(f"{row.loss[n]:.3f}" for n in lengths),
            *(f"{row.recalled[n]:.0%}" for n in lengths),
        ]
        for row in rows
    ]
    return f"The model's own window: {window:,} tokens\n{text_table(header, body)}"
