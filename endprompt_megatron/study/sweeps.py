"""The two phases of a study that chooses: every level on development data, then the chosen ones everywhere."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.evaluate.intervals import mean
from endprompt_megatron.study.choice import Measure
from endprompt_megatron.study.grid import Study, Trial
from endprompt_megatron.study.trial import DEVELOP, EVALUATE, Work
from endprompt_megatron.study.trial_scores import Measured, read_trial


@dataclass(frozen=True)
class Sweep:
    """What each level of the axis scored on development data; `chosen` is None while a trial is missing."""

    variant: str
    scores: dict[str, float]
    chosen: str | None

    @property
    def at_edge(self) -> bool:
        """Whether the best level is the first or last that was tried, so that a better one may lie beyond."""
        return self.chosen is not None and self.chosen in (next(iter(self.scores)), next(reversed(self.scores)))


def phases(study: Study, trials: list[Trial]) -> Iterator[tuple[str, list[Trial]]]:
    """What to run, one after the other: the last stage of each trial, and the trials.

    The second phase is known once the first has been run.
    """
    if study.choose is None:
        yield EVALUATE, trials
        return
    yield DEVELOP, [trial for trial in trials if study.choose.is_tried(trial.levels)]
    yield EVALUATE, [trial for trial in final_trials(study) if trial in trials]


def final_trials(study: Study) -> list[Trial]:
    """The trials that the tables report: all, or the untrained models and those of chosen levels."""
    if study.choose is None:
        return study.trials
    chosen = {sweep.variant: sweep.chosen for sweep in sweeps(study)}
    return [
        trial for trial in study.trials if not trial.trained or trial.levels[study.choose.over] == chosen[trial.variant]
    ]


def not_chosen(study: Study) -> list[Trial]:
    """The trials that have lost to another level, and are needed no more."""
    if study.choose is None:
        return []
    chosen = {sweep.variant: sweep.chosen for sweep in sweeps(study)}
    tried = [trial for trial in study.trials if trial.trained and study.choose.is_tried(trial.levels)]
    return [trial for trial in tried if chosen[trial.variant] not in (None, trial.levels[study.choose.over])]


def sweeps(study: Study) -> list[Sweep]:
    """The development scores of every trained variant, by level in the order of study.yaml."""
    if study.choose is None:
        return []
    (measure, *_), levels = study.measures, study.axes[study.choose.over]
    by_variant: dict[str, dict[str, list[float | None]]] = {}
    for trial in study.trials:
        if trial.trained and study.choose.is_tried(trial.levels):
            work = Work(study, trial, DEVELOP)
            score = None if work.left else measured(work, measure)
            of = by_variant.setdefault(trial.variant, {level: [] for level in levels})
            of[trial.levels[study.choose.over]].append(score)
    return [_sweep(variant, of, measure) for variant, of in by_variant.items()]


def _sweep(variant: str, of: dict[str, list[float | None]], measure: Measure) -> Sweep:
    there = {level: scores for level, scores in of.items() if scores}  # `exclude` may have taken some out
    known = {level: float(np.mean(scores)) for level, scores in there.items() if None not in scores}
    best = min if measure.reads.lower_is_better else max
    return Sweep(variant, known, best(known, key=known.get) if len(known) == len(there) else None)


def measured(work: Work, measure: Measure) -> float:
    """A measure of a trial's last evaluation.  Raises InputError where the evaluation lacks one of its scores."""
    return float(np.mean([mean(strata) for strata in values_of(read_trial(work), measure, work.study)]))


def values_of(trial: Measured, measure: Measure, study: Study) -> list[list[np.ndarray]]:
    """The values behind a measure, by score and stratum.  Raises InputError for a score that is not there."""
    for key in measure.keys:
        if key not in trial.values:
            known = sorted({f"{metric} of {suite}, task {task}" for suite, task, _, metric in trial.values})
            raise InputError(
                f"{study.path}: measures.{measure.name}: the evaluation has no {key[3]} of {key[0]}, task {key[1]}, "
                f"at {key[2]} tokens; it has {'; '.join(known)}"
            )
    return [trial.values[key] for key in measure.keys]


def sweeps_as_json(study: Study) -> dict:
    """For study.json: the axis, what it was judged by, and each variant's scores and choice."""
    found = sweeps(study)
    untrained = [trial for trial in study.trials if not trial.trained and study.choose.is_tried(trial.levels)]
    works = [Work(study, trial, DEVELOP) for trial in untrained]
    return {
        "over": study.choose.over,
        "where": study.choose.where,
        "evaluation": study.choose.evaluation,
        "measure": study.measures[0].as_dict(),
        "untrained": {w.trial.variant: measured(w, study.measures[0]) for w in works if not w.left},
        "rows": [
            {"name": sweep.variant, "scores": sweep.scores, "chosen": sweep.chosen, "at_edge": sweep.at_edge}
            for sweep in found
        ],
    }
