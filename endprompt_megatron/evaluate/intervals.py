"""How far a score can be trusted: intervals of 95%, and whether two models differ by more than the noise.

A score is the mean over samples, or the mean of several tasks' means, each over its own samples; hence `strata`: one
array of values a task, a single one where there are no tasks.  Shares of right answers get Wilson's interval, graded
scores and means over tasks a bootstrap.  Two models that were asked the same questions are compared question by
question.  scipy is imported where it is used: it takes half a second, and --help reads this file.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
RESAMPLES = 10_000
_AT_ONCE = 2**22  # values drawn at once: 32 MiB of indices


@dataclass(frozen=True)
class Interval:
    """Bounds of a mean, and how they were found: "wilson" or "bootstrap"."""

    low: float
    high: float
    method: str


def wilson(successes: int, samples: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's score interval of a share; right also for few samples and for shares of 0 and 1."""
    from scipy import stats

    bounds = stats.binomtest(successes, samples).proportion_ci(level, method="wilson")
    return float(bounds.low), float(bounds.high)


def t_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float] | None:
    """Student's interval of the mean of independent values, such as one a seed; None for a lone one."""
    count = len(values)
    if count < 2:
        return None
    from scipy import stats

    half = float(stats.t.ppf((1 + level) / 2, count - 1)) * float(np.std(values, ddof=1)) / math.sqrt(count)
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def resampled_means(strata: Sequence[np.ndarray], *, seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
    """Means of `resamples` draws with replacement, each stratum from itself.  float64 [resamples].

    Not scipy.stats.bootstrap: for the 500 samples of a task it takes five times as long, and its draws would give
    other intervals than those of the results that are stored already.
    """
    rng = np.random.default_rng(seed)
    total = np.zeros(resamples)
    for values in strata:
        values = np.asarray(values, dtype=np.float64)
        rows = max(1, _AT_ONCE // len(values))
        for start in range(0, resamples, rows):
            count = min(rows, resamples - start)
            total[start : start + count] += values[rng.integers(0, len(values), (count, len(values)))].mean(axis=1)
    return total / len(strata)


def bootstrap(
    strata: Sequence[np.ndarray], *, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL
) -> tuple[float, float]:
    """Percentile bootstrap of the mean of the strata's means; the same seed gives the same bounds."""
    means = resampled_means(strata, seed=seed, resamples=resamples)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean(strata: Sequence[np.ndarray]) -> float:
    """The mean of the strata's means."""
    return float(np.mean([np.mean(values, dtype=np.float64) for values in strata]))


def interval(strata: Sequence[np.ndarray]) -> Interval | None:
    """95% of the mean; None where a stratum has a single graded value, which says nothing of its spread."""
    if len(strata) == 1 and _binary(strata[0]):
        return Interval(*wilson(int(np.sum(strata[0])), len(strata[0])), "wilson")
    if all(len(values) == 1 for values in strata):
        return None
    return Interval(*bootstrap(strata), "bootstrap")


def _binary(values: np.ndarray) -> bool:
    return bool(np.isin(values, (0, 1)).all())


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p of McNemar's test: among the questions that one model alone got right, whose are they?"""
    from scipy import stats

    discordant = only_first + only_second
    return float(stats.binomtest(only_first, discordant).pvalue) if discordant else 1.0


def compare_unpaired(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> dict:
    """Second minus first where it is not known which value belongs to which question; see `compare`."""
    bounds = None
    if any(len(values) > 1 for values in (*first, *second)):
        drawn = resampled_means(second, seed=1) - resampled_means(first, seed=0)
        bounds = [float(bound) for bound in np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])]
    return {
        "samples": int(sum(len(values) for values in second)),
        "difference": mean(second) - mean(first),
        "interval": bounds,
        "p": None,
        "beyond_noise": bool(bounds and (bounds[0] > 0 or bounds[1] < 0)),
    }


def compare(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> dict:
    """Second minus first, over the same questions in the same order.

    Returns {samples, difference, interval: [low, high] or null (paired bootstrap), p: McNemar's for right-or-wrong
    scores of one task, else null, beyond_noise}.  `beyond_noise`: p below 0.05, or an interval without 0 where there
    is no p.
    """
    differences = [np.subtract(b, a, dtype=np.float64) for a, b in zip(first, second, strict=True)]
    several = any(len(values) > 1 for values in differences)
    bounds = bootstrap(differences) if several else None
    p = None
    if len(differences) == 1 and _binary(first[0]) and _binary(second[0]):
        p = mcnemar(int((differences[0] < 0).sum()), int((differences[0] > 0).sum()))
    return {
        "samples": int(sum(len(values) for values in differences)),
        "difference": mean(differences),
        "interval": list(bounds) if bounds else None,
        "p": p,
        "beyond_noise": p < 1 - LEVEL if p is not None else bool(bounds and (bounds[0] > 0 or bounds[1] < 0)),
    }


def compare_intervals(first: dict, second: dict) -> dict | None:
    """Second minus first where all that is known are two scores with their intervals (`Series.score`).

    The interval is that of two independent scores (Newcombe, 1998, method 10; Zou and Donner, 2008): of the same
    questions it is wider than a comparison question by question.  Returns what `compare` does; None without intervals.
    """
    if not (first["interval"] and second["interval"]):
        return None
    (low, high), (other_low, other_high) = first["interval"], second["interval"]
    one, other = first["score"], second["score"]
    bounds = [
        other - one - math.hypot(other - other_low, high - one),
        other - one + math.hypot(other_high - other, one - low),
    ]
    return {
        "samples": second["samples"],
        "difference": other - one,
        "interval": bounds,
        "p": None,
        "beyond_noise": bool(bounds[0] > 0 or bounds[1] < 0),
    }


@dataclass(frozen=True)
class Series:
    """The values behind one number of the results, one an answered question."""

    suite: str
    task: str  # "mean" and the like for what is over several tasks
    length: int
    metric: str
    strata: tuple[np.ndarray, ...]
    paired: bool = True  # the values are in the order of the questions

    @property
    def key(self) -> tuple[str, str, int, str]:
        return self.suite, self.task, self.length, self.metric

    def named(self) -> dict:
        """The key as a dict."""
        return dict(zip(("suite", "task", "length", "metric"), self.key, strict=True))

    def raw(self) -> dict:
        """For values.json: the values themselves."""
        return self.named() | {"paired": self.paired, "strata": [np.asarray(v).tolist() for v in self.strata]}

    def score(self) -> dict:
        """For results.json: the number, how many samples it rests on, and its interval (null for a lone one)."""
        bounds = interval(self.strata)
        return self.named() | {
            "samples": int(sum(len(values) for values in self.strata)),
            "score": mean(self.strata),
            "interval": [bounds.low, bounds.high] if bounds else None,
            "method": bounds.method if bounds else None,
        }


def comparisons(first: list[Series], second: list[Series]) -> list[dict]:
    """`compare` for every series that both models have, named as `Series.score` names it."""
    others = {series.key: series for series in second}
    result = []
    for series in first:
        other = others.get(series.key)
        if other is None or [len(v) for v in series.strata] != [len(v) for v in other.strata]:
            continue
        compared = compare if series.paired else compare_unpaired
        result.append(series.named() | compared(series.strata, other.strata))
    return result
