"""Recall prompts: a terminal segment that asks for a span of its own sample's context.

    cue tokens | key tokens of the span | the rest of the span

A fixed prompt is soon known by heart, and its loss then asks nothing of the context.  What follows the key stands
once in the context, at a place that is drawn anew for every sample: to predict it, the far tokens must look there.
The key says which place is meant.  Nothing foretells it, so it has weight 0; the cue and the rest are weighted as any
prompt.  Orthogonal to the position map, which decides how far away the segment stands (positions.py).  Pure numpy.
"""

from dataclasses import dataclass

import numpy as np

from endprompt_megatron.method.random_streams import RECALL_STREAM, draws, generator

_PARTS = 1 << 24  # in which `share` is counted


@dataclass(frozen=True)
class Recall:
    """`cue`: token ids; `tokens`: length of the span; `key`: how many of them are given; `share` of the samples."""

    cue: tuple[int, ...]
    tokens: int
    key: int
    share: float = 1.0

    @property
    def prompt(self) -> list[int]:
        """The segment with zeros where the span goes."""
        return [*self.cue, *[0] * self.tokens]

    def chosen(self, indices: np.ndarray, seed: int) -> np.ndarray:
        """Whether each sample has a recall prompt, bool, drawn purely in (seed, index)."""
        return draws(seed, indices, RECALL_STREAM, _PARTS) < round(self.share * _PARTS)

    def places(self, context_len: int, copies: int, *, index: int, seed: int) -> list[int]:
        """Where in the context the span of each copy of the prompt begins: U{0 .. a-tokens}, pure in (seed, index).

        Raises ValueError for a context that is shorter than a span.
        """
        last = context_len - self.tokens
        if last < 0:
            raise ValueError(f"a context of {context_len} tokens has no span of {self.tokens} to recall")
        return generator(seed, index, RECALL_STREAM).integers(0, last, size=copies, endpoint=True).tolist()

    def fill(self, tokens: np.ndarray, context_len: int, places: list[int]) -> None:
        """Write the spans into a sample's `tokens` [s], whose first `context_len` are its context."""
        begin = context_len + len(self.cue)
        for place in places:
            tokens[begin : begin + self.tokens] = tokens[place : place + self.tokens]
            begin += len(self.cue) + self.tokens

    def is_key(self, copies: int) -> np.ndarray:
        """Which tokens of the terminal segment are keys, bool [b]."""
        one = np.zeros(len(self.cue) + self.tokens, dtype=bool)
        one[len(self.cue) : len(self.cue) + self.key] = True
        return np.tile(one, copies)
