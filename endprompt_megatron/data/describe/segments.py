"""What a row of training tokens consists of, read off its tensors: samples, in each context and prompt, or answers.

Derived from the tensors that the model gets, not from what made them, so that a look at a row is a look at
what is trained on.  A row holds one sample, or several where it says so itself: `sample_ids` [s] numbers them from
0 (below 0: padding), or `cu_seqlens` [n+1] says where each begins.  Where some tokens of a context have a loss and
others none, as in conversations, those with one are the answers.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

CONTEXT, PROMPT, PADDING, ANSWER = "context", "prompt", "padding", "answer"


@dataclass(frozen=True)
class Segment:
    """Tokens start .. stop-1 of a row: `kind` of sample number `sample` (-1 for padding).

    `positions` are the ids of its position as contiguous ranges, both ends included.
    """

    start: int
    stop: int
    kind: str
    sample: int
    positions: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return self.stop - self.start


def segments(sample: Mapping[str, Any]) -> list[Segment]:
    """The segments of a row in physical order.  `sample` holds 1-D tensors or arrays (builder.py)."""
    prompt_mask, positions = np.asarray(sample["prompt_mask"]), np.asarray(sample["position_ids"])
    length = len(prompt_mask)
    whose = _sample_ids(sample, length)
    # The mask is of targets: the target at i is token i + 1.  A sample's last position has none.
    is_prompt = np.concatenate(([False], prompt_mask[:-1]))
    kinds = np.where(whose < 0, 2, is_prompt.astype(np.int64))
    weighed = np.concatenate(([False], np.asarray(sample["loss_weights"])[:-1] > 0))
    begins = np.concatenate(([True], np.diff(whose) != 0))  # a first token is nobody's target
    if ((kinds == 0) & ~weighed & ~begins).any():
        kinds = np.where((kinds == 0) & weighed, 3, kinds)
    changes = np.flatnonzero((np.diff(kinds) != 0) | (np.diff(whose) != 0)) + 1
    bounds = [0, *changes.tolist(), length]
    names = (CONTEXT, PROMPT, PADDING, ANSWER)
    return [
        Segment(start, stop, names[kinds[start]], int(whose[start]), ranges(positions[start:stop]))
        for start, stop in itertools.pairwise(bounds)
    ]


def samples_in(found: list[Segment]) -> list[int]:
    """Numbers of the samples of a row, in order; padding is none."""
    return list(dict.fromkeys(segment.sample for segment in found if segment.sample >= 0))


def _sample_ids(sample: Mapping[str, Any], length: int) -> np.ndarray:
    """The number of the sample that each token belongs to, int64 [s]; -1 for padding."""
    if sample.get("sample_ids") is not None:
        return np.maximum(np.asarray(sample["sample_ids"]).astype(np.int64), -1)
    if sample.get("cu_seqlens") is not None:
        bounds = np.asarray(sample["cu_seqlens"]).astype(np.int64)
        places = np.arange(length)
        whose = np.searchsorted(bounds, places, side="right") - 1
        # Positions begin at 0 and grow in every sample, which has two tokens at least; those of padding are 0.
        later = np.asarray(sample["position_ids"]) > 0
        real = later | np.concatenate((later[1:], [False]))
        return np.where((places < bounds[-1]) & real, whose, -1)
    return np.zeros(length, dtype=np.int64)


def ranges(positions: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Position ids as contiguous ranges (first, last)."""
    cuts = np.flatnonzero(np.diff(positions) != 1) + 1
    parts = np.split(np.asarray(positions), cuts)
    return tuple((int(part[0]), int(part[-1])) for part in parts if len(part))


def weight_runs(sample: Mapping[str, Any]) -> list[tuple[int, int, float]]:
    """Runs of equal loss weights: (start, stop, weight of the targets at start .. stop-1)."""
    weights = np.asarray(sample["loss_weights"])
    bounds = [0, *(np.flatnonzero(np.diff(weights) != 0) + 1).tolist(), len(weights)]
    return [(start, stop, float(weights[start])) for start, stop in itertools.pairwise(bounds)]
