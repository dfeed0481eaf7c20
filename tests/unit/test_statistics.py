"""Intervals and comparisons against published tables, closed forms and scipy."""

import math

import numpy as np
import pytest
from scipy import stats

from endprompt_megatron.evaluate.intervals import (
    Series,
    bootstrap,
    compare,
    compare_unpaired,
    comparisons,
    interval,
    mcnemar,
    t_interval,
    wilson,
)

GRADED = np.random.default_rng(7).beta(0.6, 0.9, 80)


@pytest.mark.parametrize(
    ("successes", "samples", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_are_those_of_newcombes_table(successes, samples, low, high):
    """Newcombe, 1998, table I, method 3."""
    assert wilson(successes, samples) == pytest.approx((low, high), abs=5e-5)
    mirrored = wilson(samples - successes, samples)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilson_bounds_of_0_and_1_are_exact():
    assert wilson(0, 7)[0] == 0.0
    assert wilson(7, 7)[1] == 1.0


def test_student_intervals_widen_by_the_tabulated_quantiles():
    for count, quantile in ((2, 12.706), (3, 4.303), (5, 2.776), (31, 2.042)):
        values = [number % 2 for number in range(count)]
        low, high = t_interval(values)
        assert (high - low) / 2 == pytest.approx(quantile * np.std(values, ddof=1) / math.sqrt(count), rel=1e-3)
        assert (high + low) / 2 == pytest.approx(np.mean(values))
    assert t_interval([0.3]) is None


def test_bootstrap_equals_scipys_up_to_the_draws():
    low, high = bootstrap([GRADED], resamples=200_000)
    expected = stats.bootstrap((GRADED,), np.mean, n_resamples=200_000, method="percentile", rng=0).confidence_interval
    width = expected.high - expected.low
    assert abs(low - expected.low) < 0.01 * width
    assert abs(high - expected.high) < 0.01 * width
    assert bootstrap([GRADED], resamples=200_000) == (low, high)


def test_bootstrap_of_a_mean_of_tasks_has_the_variance_of_independent_tasks():
    """A task of few wide samples beside one of many narrow ones: each weighs a half, and draws only its own."""
    rng = np.random.default_rng(0)
    tasks = [rng.normal(0.2, 0.3, 40), rng.normal(0.8, 0.1, 4000)]
    low, high = bootstrap(tasks, resamples=100_000)
    variance = sum(np.var(task) / len(task) for task in tasks) / 4
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(variance), rel=0.02)
    assert low < np.mean([task.mean() for task in tasks]) < high


def test_an_interval_is_wilsons_where_answers_are_right_or_wrong_and_none_for_a_lone_graded_one():
    assert interval([np.array([0.0, 1.0, 1.0])]).method == "wilson"
    assert interval([np.ones(500)]).low > 0.99  # and not 1: perfect scores are not certain
    assert interval([GRADED]).method == "bootstrap"
    assert interval([np.zeros(9), np.ones(9)]).method == "bootstrap"
    assert interval([np.array([0.3])]) is None
    assert interval([np.array([1.0])]).method == "wilson"


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [(0, 0, 1.0), (5, 0, 1 / 16), (0, 5, 1 / 16), (3, 9, 598 / 4096), (1, 1, 1.0), (7, 7, 1.0)],
)
def test_mcnemar_counts_the_tails_of_a_fair_coin(first, second, p):
    assert mcnemar(first, second) == pytest.approx(p, rel=1e-12)


def test_a_comparison_of_two_models_is_paired_by_question():
    """The same shift on every question is beyond the noise, although the two intervals overlap widely."""
    shifted = compare([GRADED], [GRADED + 0.02])
    assert shifted["difference"] == pytest.approx(0.02)
    assert shifted["beyond_noise"]
    assert interval([GRADED]).high > interval([GRADED + 0.02]).low
    rng = np.random.default_rng(3)
    noise = compare([GRADED], [GRADED + rng.normal(0, 0.2, 80)])
    assert noise["interval"][0] < 0 < noise["interval"][1]
    assert not noise["beyond_noise"]
    assert (shifted["p"], shifted["samples"]) == (None, 80)


def test_right_or_wrong_answers_are_compared_by_mcnemar():
    before, after = np.zeros(20), np.r_[np.ones(5), np.zeros(15)]
    found = compare([before], [after])
    assert (found["difference"], found["p"]) == (0.25, 2 * 0.5**5)
    assert not found["beyond_noise"]  # five of five discordant ones can be chance: p = 0.0625
    after[5] = 1
    assert compare([before], [after])["beyond_noise"]


def test_a_comparison_on_one_question_is_never_beyond_the_noise():
    for value in (1.0, 0.7):
        found = compare([np.array([0.0])], [np.array([value])])
        assert not found["beyond_noise"]
        assert found["interval"] is None


def test_an_unpaired_difference_is_as_wide_as_that_of_two_samples():
    first, second = np.repeat([0.0, 1.0], [60, 40]), np.repeat([0.0, 1.0], [40, 60])
    found = compare_unpaired([first], [second])
    assert found["difference"] == pytest.approx(0.2)
    half = 1.96 * math.sqrt(2 * 0.4 * 0.6 / 100)
    assert found["interval"] == pytest.approx([0.2 - half, 0.2 + half], abs=0.012)
    assert found["beyond_noise"]
    assert not compare_unpaired([first], [first[::-1]])["beyond_noise"]
    assert compare_unpaired([np.array([0.1])], [np.array([0.9])])["interval"] is None


def test_only_what_both_models_were_asked_is_compared():
    def series(task, count):
        return Series("suite", task, 0, "score", (np.linspace(0, 1, count),))

    found = comparisons([series("a", 5), series("b", 5), series("c", 5)], [series("a", 5), series("b", 6)])
    assert [each["task"] for each in found] == ["a"]


def test_intervals_of_nominal_95_percent_hold_the_truth_that_often():
    rng = np.random.default_rng(0)
    runs, share = 400, 0.3
    held = 0
    for _ in range(runs):
        low, high = wilson(int((rng.random(60) < share).sum()), 60)
        held += low <= share <= high
    assert 0.92 < held / runs < 0.98
    held = 0
    for _ in range(runs):
        low, high = bootstrap([rng.beta(2, 3, 60)], resamples=1000)
        held += low <= 0.4 <= high
    assert 0.91 < held / runs < 0.98
