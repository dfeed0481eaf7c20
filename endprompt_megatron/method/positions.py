"""The method: position ids of a training sequence, and which relative distances they supervise.

A physical sequence is a context segment of a tokens followed by a terminal prompt of b tokens; the
positions pretend that the prompt stands at the end of a window of L tokens (EndPrompt, equations 4
and 5; PoSE, section 3).  Written as position ids, for a = 5, b = 3, L = 16:

    end_prompt              0 1 2 3 4 | 13 14 15         the prompt ends the target window
    end_prompt_random       0 1 2 3 4 | u u+1 u+2        u ~ U{a .. L-b}
    end_prompt_log          0 1 2 3 4 | u u+1 u+2        u-a+1, the step there, log-uniform in 1 .. L-a-b+1
    end_prompt_curriculum   0 1 2 3 4 | u u+1 u+2        the window u+b grows from a+b to L as samples go by
    end_prompt_multi        0 1 | 5 6 7 | 13 14 15       k copies; the windows that they end grow up to L (a = 2, k = 2)
    end_prompt_near         0 1 2 3 4 | 5 6 7            no jump: the control that has a prompt
    end_prompt_pose         0 1 2 3 4 | 9 . 12 13        the prompt in chunks, each skipping further
    pose                    0 1 2 . 8 9 10 11 12         no prompt: the whole sequence in chunks
    full                    0 1 2 ... 15                 no prompt: physical length L
    short                   0 1 2 3 4                    no prompt, no jump: the control

Attention is causal in physical order, so a query at position p and an earlier key at position q
supervise the relative distance p - q; a later copy of `end_prompt_multi` sees the earlier ones too.
docs/methods.md says what each is for.  Pure functions of (lengths, seed, index): numpy only, no torch, no
Megatron, no state.  builder.py calls `position_ids`; coverage.py adds up `distance_counts`.
"""

import numpy as np

METHODS = (
    *("end_prompt", "end_prompt_random", "end_prompt_log", "end_prompt_curriculum", "end_prompt_multi"),
    *("end_prompt_near", "end_prompt_pose", "pose", "full", "short"),
)
WITH_PROMPT = METHODS[:7]
RANDOM = ("end_prompt_random", "end_prompt_log", "end_prompt_pose", "pose")
VARYING = (*RANDOM, "end_prompt_curriculum")  # positions differ from sample to sample

# Streams of `generator`: what is drawn for one sample must not depend on what else is drawn for it.
POSITION_STREAM = 0
PROMPT_STREAM = 1
CONTENT_STREAM = 2
RECALL_STREAM = 3


def generator(seed: int, index: int, stream: int) -> np.random.Generator:
    """The random numbers of sample `index`: the same on every rank, for every layout, after every resume."""
    key = np.array((seed, index), dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array((0, 0, 0, stream), dtype=np.uint64)))


def draws(seed: int, indices: np.ndarray, stream: int, below: int) -> np.ndarray:
    """A uniform number in [0, below) for each sample of `indices`, int64: `generator` where one draw does for millions.

    The bits are SplitMix64's (Steele, Lea and Flood, 2014) of seed, stream and index.
    """
    gamma, other = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03
    bits = np.asarray(indices).astype(np.uint64) * np.uint64(gamma)
    bits += np.uint64((seed * other + (stream + 1) * gamma) % 2**64)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    return ((bits >> np.uint64(32)) * np.uint64(below) >> np.uint64(32)).astype(np.int64)


def shared_positions(method: str, prompts: int) -> bool:
    """Whether all samples of a run have the same position ids.  `prompts`: how many prompts they are drawn from."""
    return method not in VARYING and (method not in WITH_PROMPT or prompts == 1)


def copies(method: str, anchors: int = 4) -> int:
    """How often the prompt stands in the terminal segment: `anchors` times for `end_prompt_multi`, else once."""
    return anchors if method == "end_prompt_multi" else 1


def segment_lengths(method: str, physical_len: int, prompt_len: int, target_len: int) -> tuple[int, int]:
    """Lengths (a, b) of context and terminal segment (`prompt_len`, all copies) in a sequence of `physical_len` tokens.

    The context shrinks so that a + b stays the physical length; methods without a prompt have b = 0, and
    `full` is physically as long as the target.  Raises ValueError if no room is left for the context, or
    the sequence does not fit into the target window.
    """
    _known(method)
    if method == "full":
        return target_len, 0
    prompt = prompt_len if method in WITH_PROMPT else 0
    if method in WITH_PROMPT and prompt < 1:
        raise ValueError(f"{method} needs a terminal prompt of at least 1 token, not {prompt_len}")
    if physical_len <= prompt:
        raise ValueError(f"a physical length of {physical_len} leaves no context beside a prompt of {prompt} tokens")
    if physical_len > target_len:
        raise ValueError(f"a physical length of {physical_len} does not fit into a target window of {target_len}")
    return physical_len - prompt, prompt


def position_ids(
    method: str,
    context_len: int,
    prompt_len: int,
    target_len: int,
    *,
    index: int = 0,
    seed: int = 0,
    chunks: int = 2,
    anchors: int = 4,
    curriculum_samples: int = 0,
) -> np.ndarray:
    """Position ids of sample `index`, shape (a+b,), int64, strictly increasing, inside [0, L).

    `prompt_len` is that of the whole terminal segment.  `chunks` is k of `pose` (the whole sequence) and
    `end_prompt_pose` (the prompt), `anchors` k of `end_prompt_multi`, whose segment is k copies of equal length;
    `curriculum_samples`: the index at which `end_prompt_curriculum` has arrived at the end.  Pure in (seed, index).
    Raises ValueError for an unknown method and for lengths that the method cannot place (a + b > L, a
    segment shorter than its chunks, `full` with a + b != L, a prompt where the method has none).
    """
    _known(method)
    a, b, target = context_len, prompt_len, target_len
    if a < 1 or b < 0 or a + b > target:
        raise ValueError(f"a context of {a} and a prompt of {b} tokens do not fit into a window of {target}")
    if (b > 0) != (method in WITH_PROMPT):
        raise ValueError(f"{method} {'needs' if b == 0 else 'has no'} terminal prompt; prompt_len is {b}")
    if method == "full" and a != target:
        raise ValueError(f"full trains on the whole window: a context of {target} tokens, not {a}")

    positions = np.arange(a + b, dtype=np.int64)
    room = target - b - a
    if method == "end_prompt":
        positions[a:] += room
    elif method == "end_prompt_random":
        positions[a:] += generator(seed, index, POSITION_STREAM).integers(0, room, endpoint=True)
    elif method == "end_prompt_log":
        # A step of d has the share log((d + 1) / d) / log(room + 2): as many samples in every octave.
        step = int((room + 2) ** generator(seed, index, POSITION_STREAM).random())
        positions[a:] += min(step - 1, room)
    elif method == "end_prompt_curriculum":
        positions[a:] += _grown(a + b, target, min(index / curriculum_samples, 1) if curriculum_samples else 1)
    elif method == "end_prompt_multi":
        if anchors < 1 or b % anchors:
            raise ValueError(f"a terminal segment of {b} tokens is not {anchors} copies of a prompt")
        skips = [_grown(a + b, target, copy / anchors) for copy in range(1, anchors + 1)]
        positions[a:] += np.repeat(skips, b // anchors)
    elif method == "end_prompt_pose":
        rng = generator(seed, index, POSITION_STREAM)
        lengths = _chunk_lengths(b, chunks, rng)
        positions[a:] += np.repeat(_growing_skips(chunks, room, rng), lengths)
    elif method == "pose":
        rng = generator(seed, index, POSITION_STREAM)
        lengths = _chunk_lengths(a, chunks, rng)
        positions += np.repeat([0, *_growing_skips(chunks - 1, target - a, rng)], lengths)
    return positions


def pose_content(length: int, document_len: int, *, index: int, seed: int) -> tuple[int, int]:
    """Where PoSE takes the content of sample `index` with 2 chunks: (r1, l2), tokens 0..r1-1 and l2..l2+length-r1-1.

    r1 is the length of the first chunk of `position_ids`; the second chunk ends at r2 ~ U{length..n} of the
    document's n tokens, which are at least `length`.
    """
    first = _chunk_lengths(length, 2, generator(seed, index, POSITION_STREAM))[0]
    stop = int(generator(seed, index, CONTENT_STREAM).integers(length, document_len, endpoint=True))
    return first, stop - (length - first)


def _known(method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known are {', '.join(METHODS)}")


def _chunk_lengths(total: int, chunks: int, rng: np.random.Generator) -> list[int]:
    """Split `total` tokens into `chunks` lengths, all at least 1.

    With 2 chunks this is PoSE's rule, the first one U{1 .. floor((c+1)/2)}; with more, each takes its
    share of what is left by the same rule.
    """
    if not 1 <= chunks <= total:
        raise ValueError(f"{total} tokens cannot be split into {chunks} chunks")
    lengths = []
    for left in range(chunks, 1, -1):
        lengths.append(int(rng.integers(1, (total + 1) // left, endpoint=True)))
        total -= lengths[-1]
    return [*lengths, total]


def _growing_skips(count: int, room: int, rng: np.random.Generator) -> list[int]:
    """`count` shifts, none smaller than the one before: u_1 ~ U{0..room}, u_j ~ U{u_(j-1)..room} (PoSE)."""
    skips, last = [], 0
    for _ in range(count):
        last = int(rng.integers(last, room, endpoint=True))
        skips.append(last)
    return skips


def _grown(physical: int, target: int, progress: float) -> int:
    """By how much a window that grows geometrically from `physical` to `target` has grown at 0 <= progress <= 1."""
    return round(physical * (target / physical) ** progress) - physical


# Coverage of relative distances


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
