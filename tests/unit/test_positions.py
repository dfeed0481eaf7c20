"""The position maps and their coverage, against the paper's formulas and a count by brute force."""

from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from endprompt_megatron.method.distances import (
    counts_of_bends,
    distance_bends,
    distance_counts,
    gaps,
    supervised_distances,
    supervised_ranges,
)
from endprompt_megatron.method.positions import MAPS, UNTOUCHED, context_chunks, copies, position_ids, segment_lengths

WITH_PROMPT = [name for name, position_map in MAPS.items() if position_map.has_prompt]


@st.composite
def cases(draw, methods=tuple(MAPS)):
    """(method, a, b, L, keywords) that the method can place."""
    method = draw(st.sampled_from(methods))
    target = draw(st.integers(8, 400))
    chunks, anchors = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    if method == "full":
        a, b = target, 0
    elif method in WITH_PROMPT:
        fewest = chunks if "chunks" in MAPS[method].knobs else 1
        b = draw(st.integers(fewest, (target - 1) // copies(method, anchors=anchors)))
        b *= copies(method, anchors=anchors)
        a = draw(st.integers(1, target - b))
    else:
        a, b = draw(st.integers(max(chunks, context_chunks(method, chunks=chunks)), target)), 0
    return (
        method,
        a,
        b,
        target,
        {
            "index": draw(st.integers(0, 2**40) | st.integers(0, 30)),
            "seed": draw(st.integers(0, 2**32 - 1)),
            "chunks": chunks,
            "anchors": anchors,
            "anchor_tokens": draw(st.integers(1, 30)),
            "sigma": draw(st.integers(1, 5)),
            "curriculum_samples": draw(st.integers(0, 30)),
        },
    )


def brute_force_counts(positions: np.ndarray, target: int) -> np.ndarray:
    distances = np.subtract.outer(positions, positions)[np.tril_indices(len(positions))]
    return np.bincount(distances, minlength=target)


@settings(deadline=None, max_examples=300)
@given(cases())
def test_position_ids_are_strictly_increasing_inside_the_window_and_pure(case):
    method, a, b, target, keywords = case
    positions = position_ids(method, a, b, target, **keywords)
    assert positions.dtype == np.int64
    assert positions.shape == (a + b,)
    assert positions[0] == 0
    assert positions[-1] < target
    assert (np.diff(positions) >= 1).all()
    np.random.seed(1)  # a map that drew from global state would now differ
    np.testing.assert_array_equal(positions, position_ids(method, a, b, target, **keywords))


@settings(deadline=None, max_examples=200)
@given(cases(methods=[name for name in WITH_PROMPT if MAPS[name].context == UNTOUCHED]))
def test_context_before_a_prompt_is_untouched_and_contiguous(case):
    method, a, b, target, keywords = case
    np.testing.assert_array_equal(position_ids(method, a, b, target, **keywords)[:a], np.arange(a))


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_end_prompt_equals_the_formula_and_supervises_exactly_the_papers_distances(data):
    target = data.draw(st.integers(2, 400))
    b = data.draw(st.integers(1, target - 1))
    a = data.draw(st.integers(1, target - b))
    positions = position_ids("end_prompt", a, b, target)
    assert positions.tolist() == [i if i < a else target - b + (i - a) for i in range(a + b)]
    # Equations 8 and 9: [0, a-1] from the context, [L-a-b+1, L-1] from prompt to context; [0, b-1] inside the prompt.
    expected = set(range(a)) | set(range(b)) | set(range(target - a - b + 1, target))
    ranges = supervised_distances(positions, target)
    assert {d for first, last in ranges for d in range(first, last + 1)} == expected
    gap = set(range(max(a, b), target - a - b + 1))
    assert {d for first, last in gaps(distance_counts(positions, target)) for d in range(first, last + 1)} == gap


@pytest.mark.parametrize(("a", "b", "target"), [(8181, 11, 65536), (8174, 18, 65536), (8182, 10, 131072)])
def test_published_setting_supervises_two_ranges_and_leaves_one_gap(a, b, target):
    counts = distance_counts(position_ids("end_prompt", a, b, target), target)
    assert supervised_ranges(counts) == [(0, a - 1), (target - a - b + 1, target - 1)]
    assert gaps(counts) == [(a, target - a - b)]
    assert counts.sum() == (a + b) * (a + b + 1) // 2
    assert counts[target - 1] == 1  # the last query and the first key: an anchor one short would give 0
    assert counts[0] == a + b


@settings(deadline=None, max_examples=300)
@given(cases())
def test_distance_counts_equal_brute_force(case):
    method, a, b, target, keywords = case
    positions = position_ids(method, a, b, target, **keywords)
    np.testing.assert_array_equal(distance_counts(positions, target), brute_force_counts(positions, target))


@settings(deadline=None, max_examples=50)
@given(st.sets(st.integers(0, 99), min_size=1), st.sets(st.integers(0, 99), min_size=1))
def test_distance_counts_of_any_increasing_positions_equal_brute_force_and_add_up(first, second):
    arrays = [np.array(sorted(positions)) for positions in (first, second)]
    expected = sum(brute_force_counts(positions, 100) for positions in arrays)
    np.testing.assert_array_equal(counts_of_bends(sum(distance_bends(p, 100) for p in arrays)), expected)


def test_random_prompt_starts_everywhere_from_a_to_the_end():
    a, b, target = 5, 3, 16
    starts = [position_ids("end_prompt_random", a, b, target, index=i, seed=7)[a:] for i in range(600)]
    assert {int(prompt[0]) for prompt in starts} == set(range(a, target - b + 1))
    assert all((np.diff(prompt) == 1).all() for prompt in starts)
    frequency = np.bincount([prompt[0] for prompt in starts], minlength=target)[a : target - b + 1]
    assert frequency.min() > 600 / 9 * 0.6  # uniform over 9 starts


def test_log_prompt_starts_at_steps_that_are_log_uniform():
    """A step of d, from the last context token to the prompt, has the share log((d + 1) / d) / log(last + 1)."""
    a, b, target, count = 5, 3, 16, 6000
    last = target - b - a + 1
    prompts = [position_ids("end_prompt_log", a, b, target, index=i, seed=7)[a:] for i in range(count)]
    assert all((np.diff(prompt) == 1).all() for prompt in prompts)
    steps = np.bincount([prompt[0] - (a - 1) for prompt in prompts], minlength=last + 1)[1:]
    assert len(steps) == last
    d = np.arange(1, last + 1)
    expected = np.log((d + 1) / d) / np.log(last + 1)
    assert expected.sum() == pytest.approx(1)
    assert (np.abs(steps / count - expected) < 5 * np.sqrt(expected * (1 - expected) / count)).all()
    # At the published lengths: as many in the nearer half of the octaves as in the farther.
    far = [position_ids("end_prompt_log", 8181, 11, 65536, index=i, seed=1)[-1] - 8191 for i in range(2000)]
    assert np.mean(np.array(far) + 1 < np.sqrt(65536 - 8191)) == pytest.approx(0.5, abs=0.06)


def test_curriculum_doubles_the_window_at_even_intervals_and_stays_at_the_end():
    a, b, target = 12, 4, 256
    ends = [
        int(position_ids("end_prompt_curriculum", a, b, target, index=i, seed=i, curriculum_samples=40)[-1]) + 1
        for i in range(60)
    ]
    assert ends[:41:10] == [16, 32, 64, 128, 256]
    assert ends == sorted(ends)
    assert set(ends[40:]) == {256}
    arrived = position_ids("end_prompt_curriculum", a, b, target, index=0)  # as in validation
    np.testing.assert_array_equal(arrived, position_ids("end_prompt", a, b, target))


def test_copies_of_the_prompt_end_windows_that_grow_geometrically():
    a, b, k, target = 52, 3, 4, 64 * 16
    positions = position_ids("end_prompt_multi", a, k * b, target, anchors=k)
    parts = positions[a:].reshape(k, b)
    assert (np.diff(parts, axis=1) == 1).all()
    # Physical length 64, target 1024: the windows are 128, 256, 512 and 1024, less the copies still to come.
    assert [int(part[-1]) + 1 + (k - 1 - j) * b for j, part in enumerate(parts)] == [128, 256, 512, 1024]
    once = position_ids("end_prompt_multi", a, b, target, anchors=1)
    np.testing.assert_array_equal(once, position_ids("end_prompt", a, b, target))
    nearest = [(0, a - 1), *((int(part[0]) - a + 1, int(part[-1])) for part in parts)]
    counts = distance_counts(positions, target)
    assert all((counts[first : last + 1] > 0).all() for first, last in nearest)  # each copy sees all of the context


def test_near_prompt_goes_on_where_the_context_ends():
    assert position_ids("end_prompt_near", 5, 3, 16).tolist() == list(range(8))


def test_chunks_of_the_prompt_reach_both_ends_and_skip_between_them():
    a, b, target = 6, 4, 20
    prompts = [position_ids("end_prompt_pose", a, b, target, index=i, seed=3, chunks=2)[a:] for i in range(800)]
    assert {int(prompt[-1]) for prompt in prompts} == set(range(a + b - 1, target))
    jumps = [int((np.diff(prompt) > 1).sum()) for prompt in prompts]
    assert set(jumps) == {0, 1}  # two chunks, one skip between them, sometimes of nothing
    assert min(int(prompt[0]) for prompt in prompts) == a
    assert max(int(prompt[0]) for prompt in prompts) == target - b


def test_anchor_tokens_of_the_released_script_end_the_window_whatever_they_are():
    """With the paper's prompt of 11 tokens and 20 that move, 9 of them are text, which crosses the gap."""
    positions = position_ids("end_prompt_anchor", 8181, 11, 65536, anchor_tokens=20)
    assert positions[:8172].tolist() == list(range(8172))
    assert positions[8172:].tolist() == list(range(65516, 65536))
    # As many as the prompt has: EndPrompt.  More than there are: all but the first.
    np.testing.assert_array_equal(
        position_ids("end_prompt_anchor", 30, 10, 400, anchor_tokens=10), position_ids("end_prompt", 30, 10, 400)
    )
    assert position_ids("end_prompt_anchor", 3, 2, 16, anchor_tokens=20).tolist() == [0, 12, 13, 14, 15]


def test_cream_has_a_head_a_tail_and_a_middle_where_it_was_published():
    """Wu et al. (2024), written out again: how long the sides are, and where the middle's last token stands."""
    a, target, sigma = 120, 480, 3
    ends: dict[int, list[int]] = {4 * (target // a): [], a // 3: []}
    for index in range(6000):
        positions = position_ids("cream", a, 0, target, index=index, seed=5)
        head, tail = positions == np.arange(a), positions == np.arange(target - a, target)
        # The shorter sides are parts of the longer ones.
        side = next(side for side in (a // 3, 16) if head[:side].all() and tail[-side:].all())
        assert (np.diff(positions[side:-side]) == 1).all()
        ends[side].append(int(positions[-side - 1]))
    assert min(map(len, ends.values())) > 2800  # either in half of the samples
    normal = NormalDist(1 + target // a, sigma)
    for side, found in ends.items():
        middle, expected = a - 2 * side, np.zeros(target)
        for halves in range(2, 2 * target // a + 1):
            low = 0 if halves == 2 else normal.cdf(halves)
            high = 1 if halves == 2 * target // a else normal.cdf(halves + 1)
            first, last = int(side + (middle - 1) * halves / 2), halves * a // 2 - side - 1
            expected[first : last + 1] += (high - low) / (last + 1 - first)
        assert expected.sum() == pytest.approx(1)
        shares = np.bincount(found, minlength=target) / len(found)
        assert np.abs(shares.cumsum() - expected.cumsum()).max() < 1.6 / len(found) ** 0.5  # Kolmogorov's, 1%


def test_pose_with_two_chunks_follows_the_published_ranges():
    c, target = 9, 30
    splits, shifts = set(), set()
    for index in range(3000):
        positions = position_ids("pose", c, 0, target, index=index, seed=5, chunks=2)
        shift = int(positions[-1]) - (c - 1)
        shifts.add(shift)
        if shift > 0:
            splits.add(int(np.flatnonzero(np.diff(positions) > 1)[0]) + 1)
    assert splits == set(range(1, (c + 1) // 2 + 1))  # r1 ~ U{1 .. floor((c+1)/2)}
    assert shifts == set(range(target - c + 1))  # u ~ U{0 .. T-c}


@pytest.mark.parametrize("method", ["end_prompt_random", "end_prompt_log", "end_prompt_pose", "pose", "cream"])
def test_random_position_maps_depend_on_index_and_on_seed(method):
    a, b = (30, 10) if MAPS[method].has_prompt else (40, 0)
    draws = {
        (seed, index): tuple(position_ids(method, a, b, 4000, index=index, seed=seed))
        for seed in (1, 2)
        for index in range(20)
    }
    assert len(draws) > 35


def test_position_maps_without_chance_ignore_index_and_seed():
    for method in [name for name, position_map in MAPS.items() if not position_map.varies]:
        a, b = (50, 0) if method == "full" else (20, 0) if method == "short" else (20, 8)
        first = position_ids(method, a, b, 50, index=1, seed=1)
        np.testing.assert_array_equal(first, position_ids(method, a, b, 50, index=2, seed=9))


def test_random_position_ids_stay_what_they_are():
    """A changed draw changes every run that is resumed: these numbers may only move with a reason."""
    assert position_ids("end_prompt_random", 5, 3, 1000, index=3, seed=42)[5] == 206
    assert position_ids("pose", 8, 0, 1000, index=3, seed=42).tolist() == [0, 708, 709, 710, 711, 712, 713, 714]


def test_context_shrinks_by_the_prompt():
    assert segment_lengths("end_prompt", 8192, 11, 65536) == (8181, 11)
    assert segment_lengths("end_prompt_pose", 100, 20, 1000) == (80, 20)
    assert segment_lengths("short", 8192, 11, 65536) == (8192, 0)
    assert segment_lengths("pose", 8192, 11, 65536) == (8192, 0)
    assert segment_lengths("full", 65536, 11, 65536) == (65536, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nosuch", 4, 2, 16), "unknown method"),
        (("end_prompt", 10, 7, 16), "do not fit"),
        (("end_prompt", 10, 0, 16), "needs"),
        (("pose", 8, 2, 16), "has no"),
        (("full", 8, 0, 16), "whole window"),
        (("pose", 1, 0, 16), "cannot be split"),
        (("end_prompt_pose", 8, 1, 16), "cannot be split"),
        (("end_prompt_multi", 8, 6, 16), "not 4 copies"),
    ],
)
def test_position_ids_refuse_what_cannot_be_placed(arguments, message):
    with pytest.raises(ValueError, match=message):
        position_ids(*arguments)


@pytest.mark.parametrize(
    "arguments", [("end_prompt", 8, 8, 16), ("end_prompt", 20, 4, 16), ("end_prompt", 8, 0, 16), ("nosuch", 8, 2, 16)]
)
def test_impossible_segment_lengths_are_refused(arguments):
    with pytest.raises(ValueError, match=r"leaves no context|does not fit|at least 1 token|unknown method"):
        segment_lengths(*arguments)
