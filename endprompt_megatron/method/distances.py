"""Which relative distances a sequence supervises, and how often: counted from its position ids.

Attention is causal in physical order, so a query at position p and an earlier key at position q supervise the
relative distance p - q.  coverage.py averages these counts over the samples of a run.
"""

import numpy as np


def distance_counts(positions: np.ndarray, target_len: int) -> np.ndarray:
    """How many (query, key) pairs of one sequence supervise each relative distance: shape (L,), int64.

    Every query counts, the last one too, as in the paper's sets (equations 8 and 9).  The work grows with
    the number of jumps and with L, never with the square of the length.
    """
    return counts_of_bends(distance_bends(positions, target_len))


def distance_bends(positions: np.ndarray, target_len: int) -> np.ndarray:
    """Second differences of `distance_counts`, shape (L+2,), int64: these add up over samples cheaply.

    The positions are a few contiguous runs.  Pairs inside a run of n tokens give the ramp n - d, pairs of two
    runs the trapezoid that two boxes convolve to; both are straight lines between two to four bends.
    """
    positions = np.asarray(positions, dtype=np.int64)
    steps = np.diff(positions)
    if positions[0] < 0 or positions[-1] >= target_len or (steps <= 0).any():
        raise ValueError(f"positions should increase strictly inside [0, {target_len})")
    cuts = np.flatnonzero(steps != 1) + 1
    first = positions[np.append(0, cuts)]
    length = np.diff(np.concatenate(([0], cuts, [len(positions)])))
    bends = np.zeros(target_len + 2, dtype=np.int64)
    for later in range(len(first)):
        n = length[later]
        bends[0] += n
        bends[1] -= n + 1
        bends[n + 1] += 1
        for earlier in range(later):
            m = length[earlier]
            nearest = first[later] - (first[earlier] + m - 1)
            bends[nearest] += 1
            bends[nearest + n] -= 1
            bends[nearest + m] -= 1
            bends[nearest + n + m] += 1
    return bends


def counts_of_bends(bends: np.ndarray) -> np.ndarray:
    """Counts for each distance, shape (L,), from (a sum of) `distance_bends`."""
    return np.cumsum(np.cumsum(bends))[:-2]


def supervised_ranges(counts: np.ndarray) -> list[tuple[int, int]]:
    """Ranges of distances, both ends included, with a count above 0."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], np.asarray(counts) > 0, [0])).astype(np.int8)))
    return [(int(start), int(stop) - 1) for start, stop in edges.reshape(-1, 2)]


def supervised_distances(positions: np.ndarray, target_len: int) -> list[tuple[int, int]]:
    """The supervised distances of one sequence as ranges; for `end_prompt` [0, a-1] and [L-a-b+1, L-1]."""
    return supervised_ranges(distance_counts(positions, target_len))


def gaps(counts: np.ndarray) -> list[tuple[int, int]]:
    """Ranges of distances inside [0, L-1] that nothing supervises; for `end_prompt` [max(a,b), L-a-b]."""
    return supervised_ranges(np.asarray(counts) == 0)
