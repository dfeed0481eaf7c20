"""What a study found: every score by variant with intervals, and every variant against the reference.

A variant's score is the mean over its seeds.  Two intervals of 95% stand beside it, for two sources of chance:
Student's over the seeds' means (other runs), and a bootstrap over requests of each request's mean over the seeds
(other requests).  A difference to the reference is taken request by request and seed by seed, and counts as beyond the
noise where neither of its two intervals contains 0; with a single seed only the requests can tell.

study.json keeps the keys of its first version: "rows" are variants, "cells" trials, "over_questions" is over requests.
"""

import json

import numpy as np

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.evaluate.intervals import bootstrap, interval, mean, t_interval
from endprompt_megatron.evaluate.registry import Key
from endprompt_megatron.study.contrasts import contrasts_of
from endprompt_megatron.study.grid import Study
from endprompt_megatron.study.sweeps import final_trials, sweeps, sweeps_as_json
from endprompt_megatron.study.trial import DEVELOP, Work
from endprompt_megatron.study.trial_scores import Measured, paired, read_trial


def compare(study: Study) -> dict:
    """The comparison of all trials that are done, as study.json holds it.  Raises InputError if none is."""
    works = [Work(study, trial) for trial in final_trials(study)]
    done = [work for work in works if not work.left]
    if not done:
        raise InputError(f"{study.path}: no trial is done yet; first run tools/study.py {study.path}")
    variants: dict[str, list[Measured]] = {variant: [] for variant in study.variants}
    for work in done:
        variants[work.trial.variant].append(read_trial(work))
    _refuse_other_inputs([each for variant in variants.values() for each in variant])
    found = {variant: measured for variant, measured in variants.items() if measured}
    reference = found.get(study.reference) if study.reference else None
    # A study that does not choose, or has named no contrast, has the keys of the first version alone.
    chosen = {"sweep": sweeps_as_json(study)} if study.choose else {}
    contrasted = {"contrasts": contrasts_of(study, found)} if study.contrasts else {}
    return {
        "format": 1,
        "title": study.title,
        "about": study.about,
        "axes": study.axes,
        "reference": study.reference,
        "evaluation": done[0].options_of(done[0].last),
        **chosen,
        **contrasted,
        "missing": [*_untried(study), *(work.trial.name for work in works if work.left)],
        "rows": [_variant(study, name, measured, reference) for name, measured in found.items()],
    }


def _untried(study: Study) -> list[str]:
    """The trials on development data that a variant's choice still waits for."""
    if study.choose is None:
        return []
    waiting = {sweep.variant for sweep in sweeps(study) if sweep.chosen is None}
    tried = [t for t in study.trials if t.variant in waiting and study.choose.is_tried(t.levels)]
    return [trial.name for trial in tried if Work(study, trial, DEVELOP).left]


def _refuse_other_inputs(trials: list[Measured]) -> None:
    """Raise InputError unless all trials were evaluated on the same inputs."""
    for trial in trials[1:]:
        if trial.inputs != trials[0].inputs:
            raise InputError(
                f"trials {trials[0].name} and {trial.name} were evaluated on different inputs (settings or text "
                "differ); evaluate them again"
            )


def _variant(study: Study, name: str, trials: list[Measured], reference: list[Measured] | None) -> dict:
    return {
        "name": name,
        "levels": {axis: level for axis, level in trials[0].state["levels"].items() if axis not in study.average},
        "trained": trials[0].state["trained"],
        "cells": [trial.name for trial in trials],
        "training": _training(trials),
        "scores": [score(key, trials) for key in trials[0].values],
        "differences": differences(trials, reference, study) if reference and name != study.reference else [],
        "by_position": _by_position(trials),
        "cost": _cost(trials),
    }


def _training(trials: list[Measured]) -> dict | None:
    """What the variant's recipe says of its budget, the same for all of its seeds."""
    state = trials[0].state
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


def _seeds(key: Key, trials: list[Measured]) -> list[float]:
    return [mean(trial.values[key]) for trial in trials]


def _over_seeds(key: Key, trials: list[Measured]) -> list[np.ndarray]:
    """Each request's mean over the trials, by stratum."""
    return [np.mean(each, axis=0) for each in zip(*(trial.values[key] for trial in trials), strict=True)]


def score(key: Key, trials: list[Measured]) -> dict:
    """A variant's score: mean over seeds, each seed's, and the intervals over seeds and over requests."""
    seeds = _seeds(key, trials)
    strata = _over_seeds(key, trials)
    over_requests = interval(strata)
    return {
        **dict(zip(("suite", "task", "length", "metric"), key, strict=True)),
        "mean": float(np.mean(seeds)),
        "seeds": seeds,
        "over_seeds": _list(t_interval(seeds)),
        "over_questions": [over_requests.low, over_requests.high] if over_requests else None,
        "samples": int(sum(len(values) for values in strata)),
    }


def differences(trials: list[Measured], reference: list[Measured], study: Study) -> list[dict]:
    """The variant minus the reference for every score that both have, over the seeds that both have.

    A variant without seeds, or with other seeds than the reference, is compared with the reference's mean over seeds.
    """
    pairs = paired(trials, reference, study.average)
    found = []
    for key in trials[0].values:
        if key not in reference[0].values:
            continue
        by_seed = [
            [np.subtract(mine, others) for mine, others in zip(_over_seeds(key, a), _over_seeds(key, b), strict=True)]
            for a, b in pairs
        ]
        seeds = [mean(strata) for strata in by_seed]
        over_seeds = t_interval(seeds)
        strata = [np.mean(each, axis=0) for each in zip(*by_seed, strict=True)]
        several = key not in trials[0].unpaired and any(len(values) > 1 for values in strata)
        over_requests = bootstrap(strata) if several else None
        known = [bounds for bounds in (over_seeds, over_requests) if bounds is not None]
        found.append(
            {
                **dict(zip(("suite", "task", "length", "metric"), key, strict=True)),
                "difference": float(np.mean(seeds)),
                "seeds": seeds,
                "over_seeds": _list(over_seeds),
                "over_questions": _list(over_requests),
                "beyond_noise": bool(known) and all(low > 0 or high < 0 for low, high in known),
            }
        )
    return found


def _by_position(trials: list[Measured]) -> list[dict]:
    """Losses by position, means over seeds."""
    return [
        {"start": buckets[0]["start"], "end": buckets[0]["end"], "loss": float(np.mean([b["loss"] for b in buckets]))}
        for buckets in zip(*(trial.by_position for trial in trials), strict=True)
    ]


def _cost(trials: list[Measured]) -> dict:
    """Means over seeds of seconds and speed, and the highest peak of memory."""

    def average(values: list[float]) -> float | None:
        return round(float(np.mean(values)), 3) if values else None

    stages = [trial.state["stages"] for trial in trials]
    costs = [trial.state["cost"] for trial in trials]
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
    """Text of study.json, one line per variant."""
    head = json.dumps({key: value for key, value in comparison.items() if key != "rows"}, indent=1)
    variants = ",\n".join(json.dumps(variant) for variant in comparison["rows"])
    return f'{head[:-2]},\n "rows": [\n{variants}\n ]\n}}\n'
