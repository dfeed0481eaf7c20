"""Contrasts between variants that a study.yaml names before the runs, and what came out of each.

The interval is a hierarchical bootstrap: base models, seeds within a base, and questions are drawn anew, each with
replacement, because each of them could have been another.  The questions are the same in all runs, so one draw of them
serves all.  With two or three base models the outer draw knows little: the interval is then too narrow rather than too
wide.  p is two-sided, adjusted over the contrasts of a measure by Holm's method (Holm, 1979).
"""

from collections.abc import Sequence

import numpy as np

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.evaluate.intervals import LEVEL, RESAMPLES, mean
from endprompt_megatron.study.choice import Measure
from endprompt_megatron.study.grid import Study
from endprompt_megatron.study.sweeps import values_of
from endprompt_megatron.study.trial_scores import Measured, paired

HIGHER, LOWER, EQUIVALENT, UNDECIDED = "higher", "lower", "equivalent", "undecided"


def contrasts_of(study: Study, found: dict[str, list[Measured]]) -> list[dict]:
    """For study.json: every contrast of variants that are there, for every measure.

    {measure, first, second, runs, difference, interval, p (Holm's), margin, verdict}.  A positive difference: the
    first has more.  Raises InputError for a measure that the evaluation lacks.
    """
    result = []
    for measure in study.measures:
        margin = study.equivalent / measure.reads.scale if measure.reads.unit == study.measures[0].reads.unit else 0.0
        rows = []
        for first, second in study.contrasts:
            if first not in found or second not in found:
                continue
            groups = paired_differences(study, measure, found[first], found[second])
            means = hierarchical_means(groups)
            rows.append(
                {
                    "measure": measure.as_dict(),
                    "first": first,
                    "second": second,
                    "runs": sum(map(len, groups)),
                    "difference": float(np.mean([np.mean([mean(run) for run in group]) for group in groups])),
                    "interval": [float(bound) for bound in np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])],
                    "inner": [float(bound) for bound in np.quantile(means, [1 - LEVEL, LEVEL])],
                    "p": two_sided(means),
                    "margin": margin,
                }
            )
        for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
            inner = row.pop("inner")
            result.append(row | {"p": p, "verdict": verdict(row["difference"], p, inner, margin)})
    return result


def paired_differences(
    study: Study, measure: Measure, first: list[Measured], second: list[Measured]
) -> list[list[list[np.ndarray]]]:
    """First minus second by question: for each base model (the first axis that is averaged over) its runs, for each
    run an array a stratum.  Raises InputError if a score's values are not in the order of the questions."""
    groups: dict[str | None, list[list[np.ndarray]]] = {}
    for (mine, *_), (other, *_) in paired(first, second, study.average):
        for trial in (mine, other):
            if set(measure.keys) & trial.unpaired:
                raise InputError(f"{study.path}: measures.{measure.name}: cannot be compared question by question")
        strata = [
            np.subtract(a, b)
            for ours, theirs in zip(values_of(mine, measure, study), values_of(other, measure, study), strict=True)
            for a, b in zip(ours, theirs, strict=True)
        ]
        outer = mine.state["levels"].get(study.average[0]) if study.average else None
        groups.setdefault(outer, []).append(strata)
    return list(groups.values())


def hierarchical_means(
    groups: Sequence[Sequence[Sequence[np.ndarray]]], *, seed: int = 0, resamples: int = RESAMPLES
) -> np.ndarray:
    """Means of `resamples` draws of groups, of runs within a group, and of questions within a stratum.

    `groups`: of runs, of strata, of float64 [questions].  A mean is that of the groups' means of the runs' means of
    the strata's means.  float64 [resamples].
    """
    rng = np.random.default_rng(seed)
    runs = [run for group in groups for run in group]
    by_run = np.zeros((resamples, len(runs)))
    for strata in zip(*runs, strict=True):
        values = np.stack([np.asarray(values, dtype=np.float64) for values in strata], axis=1)  # [questions, runs]
        count = len(values)
        drawn = rng.multinomial(count, np.full(count, 1 / count), size=resamples)
        by_run += drawn @ values / count
    by_run /= len(runs[0])
    often = rng.multinomial(len(groups), np.full(len(groups), 1 / len(groups)), size=resamples)
    means, start = np.zeros(resamples), 0
    for number, group in enumerate(groups):
        size = len(group)
        # A group that is drawn twice draws its runs twice.
        weights = rng.multinomial(often[:, number] * size, np.full(size, 1 / size))
        means += (weights * by_run[:, start : start + size]).sum(axis=1) / (size * len(groups))
        start += size
    return means


def two_sided(means: np.ndarray) -> float:
    """How often a draw lies on the other side of 0, twice; at least one draw's share."""
    share = min(np.mean(means <= 0), np.mean(means >= 0))
    return float(min(1.0, max(2 * share, 1 / len(means))))


def holm(values: Sequence[float]) -> list[float]:
    """Holm's adjusted p of each."""
    order = np.argsort(values, kind="stable")
    adjusted, largest = np.zeros(len(values)), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[place]))
        adjusted[place] = largest
    return adjusted.tolist()


def verdict(difference: float, p: float, inner: Sequence[float], margin: float) -> str:
    """What a contrast says.  `inner`: the interval of 90%, which must lie within the margin to call two equivalent."""
    if margin and -margin < inner[0] and inner[1] < margin:
        return EQUIVALENT
    if p < 1 - LEVEL:
        return HIGHER if difference > 0 else LOWER
    return UNDECIDED
