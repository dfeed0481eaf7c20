"""A small study that is right, and made-up trials."""

import json
from pathlib import Path

import numpy as np
from unit.starting import RECIPE

from endprompt_megatron.study.grid import Study, read_study
from endprompt_megatron.study.trial import EVALUATE, Work

STUDY = """
base: recipe.yaml
out: study
title: A small study
axes:
  method:
    short: {context.method: short}
    full: {context.method: full, context.physical: 256, train.global_batch_size: 2}
    end_prompt: {context.method: end_prompt}
  rope: {linear: {}, yarn: {context.rope.type: yarn}}
  seed: [1, 2, 3]
exclude: [{method: full, rope: yarn}]
untrained: {base: null, interpolated: {context.rope.type: linear}}
overrides: {train.tokens: 4096, optim.warmup_steps: 1}
evaluation: {suite: [perplexity], lengths: [64, 128], scored: 16, windows: 2, text: train, beyond_window: true}
reference: short-linear
"""


def write_study(directory: Path, text: str = STUDY, **replaced: str) -> Path:
    """study.yaml in `directory`, with one part of its text replaced by another for each of `replaced`' pairs."""
    for old, new in replaced.items():
        assert old in text, old
        text = text.replace(old, new)
    path = directory / "study.yaml"
    path.write_text(text)
    return path


RECALL = {"suite": "recall", "task": "64", "length": 128, "metric": "loss"}


def made_up(directory: Path, values: dict[str, np.ndarray], text: str = STUDY, score: dict = RECALL) -> Study:
    """The study with finished trials that nobody trained: `values` of one score, by trial."""
    (directory / "recipe.yaml").write_text(RECIPE)
    study = read_study(write_study(directory, text.replace("out: study", f"out: {directory / 'study'}")))
    make_up(study, values, EVALUATE, score)
    return study


def make_up(study: Study, values: dict[str, np.ndarray], last: str, score: dict = RECALL) -> None:
    """Finish trials up to the stage `last`: `values` of one score, by trial."""
    for trial in study.trials:
        if trial.name not in values:
            continue
        work = Work(study, trial, last)
        if not work.path.exists():
            work.begin()
        cost = {"tokens": trial.tokens, "samples": 1, "steps": 2, "step_seconds": 3.0, "tokens_per_s": 5.0}
        work.state["cost"] = cost | {"memory_gib": 0.5} if trial.trained else {}
        for stage in work.stages:
            work.state["stages"][stage] = {"seconds": 1.0, "cpu_seconds": 2.0}
        work.state["stages"][last]["options"] = work.options_of(last)
        work.write()
        found = work.results
        found.mkdir(exist_ok=True)
        entry = score | {"paired": True, "strata": [list(map(float, values[trial.name]))]}
        (found / "values.json").write_text(json.dumps({"format": 1, "extended": [entry]}))
        results = {"settings": {"seed": 0}, "text": {"sha256": "1"}, "measurements": {"extended": {}}}
        (found / "results.json").write_text(json.dumps(results))
