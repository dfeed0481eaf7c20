"""Perplexity on held-out text: by the length of the input, and by the position inside the longest one.

By length: the last `scored` tokens of each input.  The inputs of all lengths end at the same token, so every length
scores the very same tokens and only the amount of text before them differs.  A model that uses its context gets
better with length; one past its window collapses.
By position: every token of the longest input, in equal buckets.
"""

import itertools
import math
from collections.abc import Callable

import numpy as np

from endprompt_megatron.errors import InputError
from endprompt_megatron.evaluate.engine import Engine

BUCKETS = 24


def work(lengths: list[int], windows: int) -> int:
    """Inputs that `perplexity` will read, for a progress bar."""
    return len(lengths) * windows


def perplexity(
    engine: Engine,
    inputs: np.ndarray,
    lengths: list[int],
    *,
    scored: int = 512,
    tick: Callable[[str], None] = lambda _: None,
) -> dict:
    """Losses in nats.  `inputs` int64 [windows, lengths[-1]]; `lengths` ascending, each above `scored`.

    Returns {"scored", "by_length": [{length, loss, stderr, perplexity, windows: [loss of each]}],
    "by_position": [{start, end, loss, stderr, perplexity}]}; the standard errors are over windows, null for one.
    """
    longest = lengths[-1]
    if lengths[0] <= scored:
        raise InputError(
            f"--lengths {lengths[0]}: not above the {scored} tokens that are scored; use --scored N below it"
        )
    tails: dict[int, list[float]] = {length: [] for length in lengths}
    whole = []
    for row in inputs:
        for length in lengths:
            tick(f"perplexity {length}")
            # The whole longest input is scored, for the buckets; of shorter ones the tail alone.
            wanted = None if length == longest else scored
            losses, _ = engine.token_losses(row[None, longest - length :], last=wanted)
            tails[length].append(float(losses[0, -scored:].mean(dtype=np.float64)))
            if length == longest:
                whole.append(losses[0])
    by_length = [
        {"length": length, **_summary(tails[length]), "windows": [round(loss, 6) for loss in tails[length]]}
        for length in lengths
    ]
    return {"scored": scored, "by_length": by_length, "by_position": _buckets(np.stack(whole))}


def _buckets(losses: np.ndarray) -> list[dict]:
    """`losses` [windows, s-1]: the loss at column i is that of the token at position i + 1."""
    edges = np.linspace(0, losses.shape[1] + 1, min(BUCKETS, losses.shape[1]) + 1).round().astype(int)
    result = []
    for start, end in itertools.pairwise(edges):
        columns = losses[:, max(start, 1) - 1 : end - 1]
        if columns.shape[1]:
            means = columns.mean(axis=1, dtype=np.float64).tolist()
            result.append({"start": int(start), "end": int(end), **_summary(means)})
    return result


def _summary(means: list[float]) -> dict:
    """Mean over windows, its standard error, and the perplexity of the mean."""
    loss = float(np.mean(means))
    stderr = float(np.std(means, ddof=1) / math.sqrt(len(means))) if len(means) > 1 else None
    return {"loss": loss, "stderr": stderr, "perplexity": math.exp(min(loss, 700.0))}
