"""The random numbers of a sample: functions of (seed, index, stream), whatever the layout and after every resume."""

import numpy as np

# What is drawn for one purpose must not depend on what else is drawn for the sample.
POSITION_STREAM = 0
PROMPT_STREAM = 1
CONTENT_STREAM = 2
RECALL_STREAM = 3


def generator(seed: int, index: int, stream: int) -> np.random.Generator:
    """The random numbers of sample `index`: the same on every rank, for every layout, after every resume."""
    key = np.array((seed, index), dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array((0, 0, 0, stream), dtype=np.uint64)))


def draws(seed: int, indices: np.ndarray, stream: int, below: int) -> np.ndarray:
    """A uniform number in [0, below) for each sample of `indices`, int64: fast enough for millions of samples.

    The bits are SplitMix64's (Steele, Lea and Flood, 2014) of seed, stream and index.
    """
    gamma, other = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03
    bits = np.asarray(indices).astype(np.uint64) * np.uint64(gamma)
    bits += np.uint64((seed * other + (stream + 1) * gamma) % 2**64)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    return ((bits >> np.uint64(32)) * np.uint64(below) >> np.uint64(32)).astype(np.int64)
