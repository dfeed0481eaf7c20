"""The method: the position ids of a training sequence.

A physical sequence is a context segment of a tokens followed by a terminal prompt of b tokens.  Its position ids
pretend that it stands in a window of L tokens (EndPrompt, equations 4 and 5; PoSE, section 3).  Each position map is
a function below, which begins with its ids for a = 5, b = 3, L = 16, and a row of MAPS, from which the recipe's
checks, the planner, the model card, the report and the docs take what they say of it.

Pure functions of (lengths, seed, index): numpy only, no state.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from endprompt_megatron.method.random_streams import CONTENT_STREAM, POSITION_STREAM, generator


@dataclass(frozen=True)
class Sample:
    """What a map places: a context of `a` tokens and a terminal segment of `b` in a window of `target` tokens."""

    a: int
    b: int
    target: int
    index: int  # the sample's number in the run
    seed: int

    @property
    def room(self) -> int:
        """How far the terminal segment can move before it leaves the window."""
        return self.target - self.b - self.a

    def draw(self) -> np.random.Generator:
        """The sample's random numbers, from the first one on."""
        return generator(self.seed, self.index, POSITION_STREAM)

    def contiguous(self) -> np.ndarray:
        """0 1 2 ..., int64 [a + b]."""
        return np.arange(self.a + self.b, dtype=np.int64)

    def prompt_moved(self, by: int | np.ndarray) -> np.ndarray:
        """The contiguous ids with the terminal segment `by` further on: one number, or one a token [b]."""
        positions = self.contiguous()
        positions[self.a :] += by
        return positions


def end_prompt(s: Sample) -> np.ndarray:
    """0 1 2 3 4 | 13 14 15: the prompt ends the target window."""
    return s.prompt_moved(s.room)


def end_prompt_random(s: Sample) -> np.ndarray:
    """0 1 2 3 4 | u u+1 u+2: u ~ U{a .. L-b}."""
    return s.prompt_moved(s.draw().integers(0, s.room, endpoint=True))


def end_prompt_log(s: Sample) -> np.ndarray:
    """0 1 2 3 4 | u u+1 u+2: the step to the prompt, u-a+1, is log-uniform in 1 .. L-a-b+1."""
    # A step of d has the share log((d + 1) / d) / log(room + 2): as many samples in every octave.
    step = int((s.room + 2) ** s.draw().random())
    return s.prompt_moved(min(step - 1, s.room))


def end_prompt_curriculum(s: Sample, curriculum_samples: int = 0) -> np.ndarray:
    """0 1 2 3 4 | u u+1 u+2: the window u+b grows from a+b to L in `curriculum_samples` samples (0: it is L)."""
    progress = min(s.index / curriculum_samples, 1) if curriculum_samples else 1
    return s.prompt_moved(_grown(s.a + s.b, s.target, progress))


def end_prompt_multi(s: Sample, anchors: int = 4) -> np.ndarray:
    """0 1 | 5 6 7 | 13 14 15: `anchors` copies of the prompt; the windows that they end grow up to L."""
    if anchors < 1 or s.b % anchors:
        raise ValueError(f"a terminal segment of {s.b} tokens is not {anchors} copies of a prompt")
    skips = [_grown(s.a + s.b, s.target, copy / anchors) for copy in range(1, anchors + 1)]
    return s.prompt_moved(np.repeat(skips, s.b // anchors))


def end_prompt_near(s: Sample) -> np.ndarray:
    """0 1 2 3 4 | 5 6 7: the prompt stands where the context ends."""
    return s.contiguous()


def end_prompt_anchor(s: Sample, anchor_tokens: int = 20) -> np.ndarray:
    """0 1 2 3 | 12 13 14 15: the last `anchor_tokens` of the sample, prompt or not, end the target window."""
    positions = s.contiguous()
    positions[-min(anchor_tokens, s.a + s.b - 1) :] += s.room
    return positions


def end_prompt_pose(s: Sample, chunks: int = 2) -> np.ndarray:
    """0 1 2 3 4 | 9 . 12 13: the prompt in `chunks`, each of which skips further."""
    draw = s.draw()
    lengths = _chunk_lengths(s.b, chunks, draw)
    return s.prompt_moved(np.repeat(_growing_skips(chunks, s.room, draw), lengths))


def pose(s: Sample, chunks: int = 2) -> np.ndarray:
    """0 1 2 . 8 9 10 11 12: the whole sequence in `chunks`, each but the first moved by a random skip."""
    draw = s.draw()
    lengths = _chunk_lengths(s.a, chunks, draw)
    return s.contiguous() + np.repeat([0, *_growing_skips(chunks - 1, s.room, draw)], lengths)


def cream(s: Sample, sigma: int = 3) -> np.ndarray:
    """0 . 6 7 8 . 15: a head, a tail that ends the window, and a middle between them (Wu et al., 2024, CREAM).

    Half of the samples have a third of their tokens in head and tail each, the others 4 for each multiple of the
    sample's length that the window has.  Where the middle may end is drawn from a normal distribution cut off at the
    window's ends, of `sigma` half lengths.
    """
    if s.a < CREAM_CHUNKS:
        raise ValueError(f"{s.a} tokens cannot be split into {CREAM_CHUNKS} chunks")
    draw, multiple = s.draw(), s.target // s.a
    third = s.a // 3
    side = third if draw.integers(0, 2) == 0 else min(4 * multiple, third)
    middle = s.a - 2 * side
    grid, shares = _halves(multiple, sigma)
    halves = int(np.interp(draw.random(), shares, grid))
    first, last = int(side + (middle - 1) * halves / 2), halves * s.a // 2 - side - 1
    end = int(draw.integers(first, last, endpoint=True))
    starts = np.repeat([0, end - (middle - 1) - side, s.target - s.a], [side, middle, side])
    return s.contiguous() + starts


@lru_cache
def _halves(multiple: int, sigma: int) -> tuple[np.ndarray, np.ndarray]:
    """Half lengths of a sample from 2 to twice `multiple`, and the normal distribution's share below each."""
    grid = np.linspace(2, 2 * multiple, 1000)
    shares = [0.5 * (1 + math.erf((x - 1 - multiple) / (sigma * math.sqrt(2)))) for x in grid]
    return grid, np.asarray(shares)


def full(s: Sample) -> np.ndarray:
    """0 1 2 ... 15: a sequence that is as long as the window."""
    if s.a != s.target:
        raise ValueError(f"full trains on the whole window: a context of {s.target} tokens, not {s.a}")
    return s.contiguous()


def short(s: Sample) -> np.ndarray:
    """0 1 2 3 4: the sequence as it is."""
    return s.contiguous()


@dataclass(frozen=True)
class PositionMap:
    """A value of `context.method`, declared once.  Its knobs are keyword arguments of `place` and keys of `context`."""

    name: str
    title: str  # on the planner's page
    summary: str  # on the model card
    place: Callable[..., np.ndarray]  # (Sample, **knobs) -> position ids int64 [a + b], strictly increasing
    context: str  # what the context segment does, for the docs
    prompt: str = ""  # what the terminal prompt does; empty: the map has none
    varies: bool = False  # positions differ from sample to sample
    contiguous: bool = False  # no position is skipped: far distances do not come from position ids
    whole_window: bool = False  # the physical sequence is as long as the window
    copies: str | None = None  # the knob that says how often the prompt stands in the terminal segment; None: once
    context_chunks: str | int = 1  # into how many chunks the context is split, or the knob that says it
    content_skip: bool = False  # `context.content_skip` takes the chunks' content from different places (pose_content)

    @property
    def has_prompt(self) -> bool:
        """Whether a terminal prompt follows the context."""
        return bool(self.prompt)

    @property
    def plain(self) -> bool:
        """Whether this is ordinary training on short sequences: the control of what has a prompt or a skip."""
        return self.contiguous and not self.has_prompt and not self.whole_window

    @cached_property
    def knobs(self) -> dict[str, int]:
        """The knobs of the map and their defaults."""
        _, *arguments = inspect.signature(self.place).parameters.values()
        return {argument.name: argument.default for argument in arguments}

    def chosen(self, given: Mapping[str, int]) -> dict[str, int]:
        """The map's knobs as `given`, by default as declared; knobs of other maps have no effect.

        Raises TypeError for what is a knob of no map.
        """
        for name in given.keys() - self.knobs.keys():
            if all(name not in other.knobs for other in MAPS.values()):
                raise TypeError(f"{name} is a knob of no position map")
        return {name: given.get(name, default) for name, default in self.knobs.items()}


UNTOUCHED = "0 .. a-1"
CREAM_CHUNKS = 3
MAPS = {
    position_map.name: position_map
    for position_map in (
        PositionMap(
            "end_prompt",
            "EndPrompt",
            "EndPrompt (a short context and a terminal prompt at the end of the target window)",
            end_prompt,
            UNTOUCHED,
            "L-b .. L-1: it ends the target window",
        ),
        PositionMap(
            "end_prompt_random",
            "EndPrompt, random place",
            "EndPrompt with the terminal prompt at a random place",
            end_prompt_random,
            UNTOUCHED,
            "starts at u ~ U{a .. L-b}",
            varies=True,
        ),
        PositionMap(
            "end_prompt_log",
            "EndPrompt, log-uniform place",
            "EndPrompt with the terminal prompt at a log-uniform distance",
            end_prompt_log,
            UNTOUCHED,
            "starts at a log-uniform distance from the context",
            varies=True,
        ),
        PositionMap(
            "end_prompt_curriculum",
            "EndPrompt, near to far",
            "EndPrompt with the terminal prompt moving from near to the end",
            end_prompt_curriculum,
            UNTOUCHED,
            "ends a window that grows from a+b to L as samples go by",
            varies=True,
        ),
        PositionMap(
            "end_prompt_multi",
            "EndPrompt, several prompts",
            "EndPrompt with several terminal prompts at growing distances",
            end_prompt_multi,
            UNTOUCHED,
            "several copies; the windows that they end grow up to L",
            copies="anchors",
        ),
        PositionMap(
            "end_prompt_near",
            "short training with a prompt (a control)",
            "a terminal prompt directly after the context (a control)",
            end_prompt_near,
            UNTOUCHED,
            "a .. a+b-1: no jump",
            contiguous=True,
        ),
        PositionMap(
            "end_prompt_anchor",
            "EndPrompt, as released",
            "EndPrompt with the last tokens of the sample, text or prompt, at the end of the target window",
            end_prompt_anchor,
            "0 .. a-1, but for its last tokens where fewer than `anchor_tokens` are prompt",
            "L-b .. L-1, with the context's last tokens before it",
        ),
        PositionMap(
            "end_prompt_pose",
            "EndPrompt with PoSE chunks",
            "EndPrompt with the terminal prompt split into shifted chunks",
            end_prompt_pose,
            UNTOUCHED,
            "split into chunks, each of which skips further",
            varies=True,
        ),
        PositionMap(
            "pose",
            "PoSE",
            "PoSE (chunks with skipped positions)",
            pose,
            "split into chunks, each but the first moved by a random skip",
            varies=True,
            context_chunks="chunks",
            content_skip=True,
        ),
        PositionMap(
            "cream",
            "CREAM",
            "CREAM (a head, a middle at a random place and a tail at the end of the target window)",
            cream,
            "a head, a middle that moves, a tail that ends the target window",
            varies=True,
            context_chunks=CREAM_CHUNKS,
        ),
        PositionMap(
            "full",
            "full-length training",
            "full-length fine-tuning",
            full,
            "0 .. L-1, as long as the window",
            contiguous=True,
            whole_window=True,
        ),
        PositionMap(
            "short",
            "short training without a prompt (the control)",
            "short-context fine-tuning (the control: no terminal prompt)",
            short,
            "0 .. a-1: no jump",
            contiguous=True,
        ),
    )
}


def position_ids(
    method: str, context_len: int, prompt_len: int, target_len: int, *, index: int = 0, seed: int = 0, **knobs: int
) -> np.ndarray:
    """Position ids of sample `index`, shape (a+b,), int64, strictly increasing, inside [0, L).

    `prompt_len` is that of the whole terminal segment, all copies of the prompt.  `knobs`: those of the method; those
    of other methods have no effect.  Pure in (seed, index).  Raises ValueError for an unknown method and for lengths
    that the method cannot place (a + b > L, a segment shorter than its chunks, a prompt where the method has none).
    """
    position_map = known(method)
    a, b, target = context_len, prompt_len, target_len
    if a < 1 or b < 0 or a + b > target:
        raise ValueError(f"a context of {a} and a prompt of {b} tokens do not fit into a window of {target}")
    if (b > 0) != position_map.has_prompt:
        raise ValueError(f"{method} {'needs a' if b == 0 else 'has no'} terminal prompt; prompt_len is {b}")
    return position_map.place(Sample(a, b, target, index, seed), **position_map.chosen(knobs))


def segment_lengths(method: str, physical_len: int, prompt_len: int, target_len: int) -> tuple[int, int]:
    """Lengths (a, b) of context and terminal segment (`prompt_len`, all copies) in a sequence of `physical_len` tokens.

    The context shrinks so that a + b stays the physical length; methods without a prompt have b = 0, and
    `full` is physically as long as the target.  Raises ValueError if no room is left for the context, or
    the sequence does not fit into the target window.
    """
    position_map = known(method)
    if position_map.whole_window:
        return target_len, 0
    prompt = prompt_len if position_map.has_prompt else 0
    if position_map.has_prompt and prompt < 1:
        raise ValueError(f"{method} needs a terminal prompt of at least 1 token, not {prompt_len}")
    if physical_len <= prompt:
        raise ValueError(f"a physical length of {physical_len} leaves no context beside a prompt of {prompt} tokens")
    if physical_len > target_len:
        raise ValueError(f"a physical length of {physical_len} does not fit into a target window of {target_len}")
    return physical_len - prompt, prompt


def copies(method: str, **knobs: int) -> int:
    """How often the prompt stands in the terminal segment."""
    position_map = known(method)
    return position_map.chosen(knobs)[position_map.copies] if position_map.copies else 1


def context_chunks(method: str, **knobs: int) -> int:
    """Into how many chunks the context is split."""
    position_map = known(method)
    chunks = position_map.context_chunks
    return chunks if isinstance(chunks, int) else position_map.chosen(knobs)[chunks]


def shared_positions(method: str, prompts: int) -> bool:
    """Whether all samples of a run have the same position ids.  `prompts`: how many prompts they are drawn from."""
    position_map = known(method)
    return not position_map.varies and (not position_map.has_prompt or prompts == 1)


def pose_content(length: int, document_len: int, *, index: int, seed: int) -> tuple[int, int]:
    """Where PoSE takes the content of sample `index` with 2 chunks: (r1, l2), tokens 0..r1-1 and l2..l2+length-r1-1.

    r1 is the length of the first chunk of `position_ids`; the second chunk ends at r2 ~ U{length..n} of the
    document's first n tokens, which are at least `length` and, as in PoSE's script, at most 5 times as many.
    """
    document_len = min(document_len, 5 * length)
    first = _chunk_lengths(length, 2, generator(seed, index, POSITION_STREAM))[0]
    stop = int(generator(seed, index, CONTENT_STREAM).integers(length, document_len, endpoint=True))
    return first, stop - (length - first)


def known(method: str) -> PositionMap:
    """The position map of that name.  Raises ValueError for an unknown one."""
    if method not in MAPS:
        raise ValueError(f"unknown method {method!r}; known are {', '.join(MAPS)}")
    return MAPS[method]


def _chunk_lengths(total: int, chunks: int, draw: np.random.Generator) -> list[int]:
    """Split `total` tokens into `chunks` lengths, all at least 1.

    With 2 chunks this is PoSE's rule, the first one U{1 .. floor((c+1)/2)}; with more, each takes its
    share of what is left by the same rule.
    """
    if not 1 <= chunks <= total:
        raise ValueError(f"{total} tokens cannot be split into {chunks} chunks")
    lengths = []
    for left in range(chunks, 1, -1):
        lengths.append(int(draw.integers(1, (total + 1) // left, endpoint=True)))
        total -= lengths[-1]
    return [*lengths, total]


def _growing_skips(count: int, room: int, draw: np.random.Generator) -> list[int]:
    """`count` shifts, none smaller than the one before: u_1 ~ U{0..room}, u_j ~ U{u_(j-1)..room} (PoSE)."""
    skips, last = [], 0
    for _ in range(count):
        last = int(draw.integers(last, room, endpoint=True))
        skips.append(last)
    return skips


def _grown(physical: int, target: int, progress: float) -> int:
    """By how much a window that grows geometrically from `physical` to `target` has grown at 0 <= progress <= 1."""
    return round(physical * (target / physical) ** progress) - physical
