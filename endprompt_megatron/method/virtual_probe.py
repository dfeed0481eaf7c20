"""The virtual-distance probe: what a model makes of a far position, asked with a short input.

A row has s physical tokens.  The context's c tokens stand at positions 0..c-1; the last t tokens, the tail, stand at
D-t..D-1, where D is the virtual length.  This is the geometry of an EndPrompt sample with target D: to the rotary
embedding the tail stands at the end of an input of D tokens, to the hardware it is s tokens.  At D = s there is no
jump: the natural input, and the value to compare with.

Two kinds:
  repeat    the tail repeats a passage from the first half of the context, word for word.  Nothing near the tail
            foretells it: to be right the model must attend across the jump (relative distance D - t - q for a
            passage at q).  The first few tokens of the tail, which only say that a repeat begins, are not scored.
  continue  the text simply goes on in the tail.  The loss says how much the jump disturbs ordinary prediction.

Every distance sees the same tokens; only the position ids change, so differences are due to the distance alone.
What it cannot show: D tokens of real text compete for attention in a real input, here only s do.  Pure numpy: the
training loop runs the same rows through the Megatron model as validation.
"""

import numpy as np

KINDS = ("repeat", "continue")


def default_distances(physical_len: int, target_len: int) -> list[int]:
    """The physical length (no jump), the powers of two above it, and the target, ascending."""
    if target_len < physical_len:
        raise ValueError(f"target length {target_len} is below the physical length {physical_len}")
    powers = [2**exponent for exponent in range(64) if physical_len < 2**exponent < target_len]
    return sorted({physical_len, *powers, target_len})


def tail_length(physical_len: int) -> int:
    """Tokens in the tail: a quarter of the row, at most 64."""
    return min(64, physical_len // 4)


def probe_inputs(
    token_stream: np.ndarray,
    *,
    physical_len: int,
    distances: list[int],
    samples: int,
    seed: int,
    kind: str = "repeat",
) -> list[dict]:
    """One dict a distance: distance, tokens int64 [k, s], position_ids int64 [k, s], scored bool [k, s-1].

    `token_stream` int64 [n], held-out text, n >= s; `scored[:, i]` says whether the prediction made at i counts.
    Pure in (token_stream, seed).  Raises ValueError for a stream, row or distance that is too short.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; known are {', '.join(KINDS)}")
    if physical_len < 16:
        raise ValueError(f"a probe row of {physical_len} tokens is too short; use 16 or more")
    if len(token_stream) < physical_len:
        raise ValueError(f"the text has {len(token_stream)} tokens, a probe row needs {physical_len}")
    if min(distances) < physical_len:
        raise ValueError(f"virtual length {min(distances)} is below the row's {physical_len} tokens")
    tail = tail_length(physical_len)
    context = physical_len - tail
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(samples):
        start = int(rng.integers(0, len(token_stream) - physical_len + 1))
        row = np.array(token_stream[start : start + physical_len], dtype=np.int64)
        passage = int(rng.integers(0, (context - tail) // 2 + 1))
        if kind == "repeat":
            row[context:] = row[passage : passage + tail]
        rows.append(row)
    tokens = np.stack(rows)
    # The prediction at i is about token i + 1; those made inside the tail look across the jump.
    cue = min(8, tail // 4) if kind == "repeat" else 1
    scored = np.zeros((samples, physical_len - 1), dtype=bool)
    scored[:, context + cue - 1 :] = True
    probes = []
    for distance in distances:
        positions = np.concatenate([np.arange(context), np.arange(distance - tail, distance)])
        probes.append(
            {
                "distance": int(distance),
                "tokens": tokens,
                "position_ids": np.tile(positions, (samples, 1)),
                "scored": scored,
            }
        )
    return probes


def summarise(losses: np.ndarray, correct: np.ndarray, scored: np.ndarray) -> dict[str, float]:
    """Mean loss in nats and share of right greedy predictions over the scored places; arrays all [k, s-1]."""
    scored = np.asarray(scored, dtype=bool)
    return {
        "loss": float(np.asarray(losses, dtype=np.float64)[scored].mean()),
        "accuracy": float(np.asarray(correct, dtype=np.float64)[scored].mean()),
    }
