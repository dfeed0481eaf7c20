"""Equation 3's bounds: never exceeded by random scores, reached by one wave, and those of the real RoPE."""

import math

import numpy as np
import pytest

from endprompt_megatron.method.smoothness import Smoothness

LLAMA3 = 500000.0 ** -(np.arange(64) / 64)


def score(frequencies, amplitudes, phases, at):
    """S(d) [places] of cosines, and its derivatives by the rules of calculus."""
    angles = np.outer(at, frequencies) + phases
    first = -np.sin(angles) @ (amplitudes * frequencies)
    second = -np.cos(angles) @ (amplitudes * frequencies**2)
    return np.cos(angles) @ amplitudes, first, second


@pytest.mark.parametrize("seed", range(20))
def test_no_random_attention_score_changes_faster_than_the_bound(seed):
    # Frequencies with a common period: on a grid of a whole period the greatest value is found, not estimated.
    rng = np.random.default_rng(seed)
    period, count = 512, int(rng.integers(1, 9))
    waves = np.sort(rng.choice(np.arange(1, 33), count, replace=False))
    found = Smoothness(2 * math.pi * waves / period)
    amplitudes, phases = rng.normal(size=count), rng.uniform(0, 2 * math.pi, count)
    at = np.arange(0, period, 1 / 16)
    values, first, second = score(found.frequencies, amplitudes, phases, at)
    most = np.abs(values).max()
    assert np.abs(first).max() <= found.slope * most * (1 + 1e-3)
    assert np.abs(second).max() <= found.curvature * most * (1 + 1e-3)
    assert np.abs(first).max() <= found.slope_of(amplitudes) * (1 + 1e-12)
    for steps in (1, 16, 100, 1000, 4000):
        change = np.abs(values - np.roll(values, steps)).max()
        assert change <= found.change(steps / 16) * most * (1 + 1e-3)
    # The derivatives above are those of the values.
    assert first[1:-1] == pytest.approx((values[2:] - values[:-2]) * 8, abs=found.slope**3 * np.abs(amplitudes).sum())


def test_scores_of_real_rope_stay_within_the_bound_by_autograd():
    import torch

    found = Smoothness(LLAMA3 / 8)
    generator = torch.Generator().manual_seed(0)
    frequencies = torch.from_numpy(found.frequencies)
    for _ in range(10):
        query, key = torch.randn(2, 64, generator=generator, dtype=torch.cfloat).to(torch.cdouble)
        distance = (torch.rand(2000, generator=generator, dtype=torch.float64) * 65536).requires_grad_()
        # RoPE itself: the key stays where it is, the query turns with the distance.
        turned = query * torch.polar(torch.ones(()).double(), distance[:, None] * frequencies)
        scores = (turned * key.conj()).real.sum(-1)
        slopes = torch.autograd.grad(scores.sum(), distance)[0]
        amplitudes = (query * key.conj()).abs().numpy()
        assert slopes.abs().max() <= found.slope_of(amplitudes)
        assert found.slope_of(amplitudes) < found.slope * amplitudes.sum()


def test_one_wave_reaches_the_bound_of_equation_3():
    found = Smoothness(np.array([0.3, 0.01]))
    at = np.linspace(0, 100, 100001)
    _, first, second = score(found.frequencies, np.array([2.0, 0.0]), np.zeros(2), at)
    assert np.abs(first).max() == pytest.approx(found.slope * 2, rel=1e-6)
    assert np.abs(second).max() == pytest.approx(found.curvature * 2, rel=1e-6)
    assert score(found.frequencies, np.array([2.0, 0.0]), np.zeros(2), [found.swing])[0] == pytest.approx(-2)
    assert found.change(1.5) == pytest.approx(2 * math.sin(0.225))
    assert found.change(found.swing) == found.change(1e9) == 2


def test_interpolation_divides_the_bounds_of_equation_3():
    before, after = Smoothness(LLAMA3), Smoothness(LLAMA3 / 8)
    assert before.slope == 1
    assert after.slope == 1 / 8
    assert after.curvature == 1 / 64
    assert after.swing == pytest.approx(8 * math.pi)
    assert (after.wavelengths == pytest.approx(8 * before.wavelengths)) is True
    gap = 49170
    assert before.turning_within(gap) > after.turning_within(gap)
    # By counting: wave j has 2 pi 8 theta^(j/64) tokens.
    turning = [j for j in range(64) if 2 * math.pi * 8 * 500000 ** (j / 64) <= gap]
    once = [j for j in range(64) if math.pi * 8 * 500000 ** (j / 64) > gap]
    assert after.turning_within(gap) == len(turning) / 64
    assert after.turning_once(gap) == len(once) / 64


@pytest.mark.parametrize("frequencies", [[], [0.0], [-1.0], [math.nan], [[1.0]]])
def test_smoothness_of_what_is_no_frequency_is_refused(frequencies):
    with pytest.raises(ValueError, match="positive numbers"):
        Smoothness(np.array(frequencies))
