"""How long the documents of a corpus are, and whether that suits the method.  numpy alone; reads only the .idx."""

from dataclasses import asdict, dataclass

import numpy as np

from endprompt_megatron.method.positions import known

ENOUGH = 0.5  # share of the tokens that should lie in documents as long as the method's reach
_SHORTEST_BIN = 128


@dataclass(frozen=True)
class Bin:
    """Documents of `least` to `below` tokens (None: no bound), and their tokens."""

    least: int
    below: int | None
    documents: int
    tokens: int


@dataclass(frozen=True)
class Lengths:
    """Of a dataset's documents, in tokens; `bins` double from one to the next."""

    documents: int
    tokens: int
    median: int
    mean: float
    longest: int
    bins: tuple[Bin, ...]

    def as_dict(self) -> dict:
        return asdict(self)


def lengths_of(lengths: np.ndarray) -> Lengths:
    """Statistics of document lengths, int32 [documents]."""
    longest = int(lengths.max(initial=0))
    edges = [0, _SHORTEST_BIN]
    while edges[-1] <= longest:
        edges.append(2 * edges[-1])
    whose = np.searchsorted(edges, lengths, side="right") - 1
    documents = np.bincount(whose, minlength=len(edges) - 1)
    tokens = np.bincount(whose, weights=lengths, minlength=len(edges) - 1)
    return Lengths(
        documents=len(lengths),
        tokens=int(lengths.sum(dtype=np.int64)),
        median=int(np.median(lengths)) if len(lengths) else 0,
        mean=float(lengths.mean()) if len(lengths) else 0.0,
        longest=longest,
        bins=tuple(
            Bin(least, below, int(count), int(held))
            for least, below, count, held in zip(edges, edges[1:], documents, tokens, strict=False)
        ),
    )


def at_least(lengths: np.ndarray, tokens: int) -> tuple[int, float]:
    """How many documents have at least `tokens` tokens, and their share of all tokens."""
    long = lengths[lengths >= tokens]
    total = int(lengths.sum(dtype=np.int64))
    return len(long), int(long.sum(dtype=np.int64)) / total if total else 0.0


def reach(method: str, physical: int, target: int) -> int:
    """Tokens of a document that a method takes the text of one sample from, to teach what it is meant to.

    One that trains on the whole window meets its distances in the text itself; PoSE and CREAM take their chunks
    from one document; the others take any text up to the physical length, and their far distances from position ids.
    0 for those.
    """
    position_map = known(method)
    if position_map.whole_window:
        return target
    return physical if position_map.context_chunks != 1 else 0


def verdict(
    method: str, physical: int, target: int, ends: str, lengths: list[np.ndarray], shares: list[float]
) -> tuple[bool, str]:
    """Whether the documents are long enough for the method, and a sentence about it.

    `lengths` of each source's documents (those that the run may read), `shares` of the samples, adding up to 1.
    """
    needed = reach(method, physical, target)
    asked = needed or physical
    share = sum(at_least(held, asked)[1] * part for held, part in zip(lengths, shares, strict=True))
    have = f"{percent(share)} of the tokens are in documents of at least {asked:,}"
    if not needed:
        return True, f"{method} needs no long documents: far distances come from position ids, not from text ({have})."
    if ends == "within":
        return True, f"The documents are long enough for {method}: each sample lies within one ({have})."
    if share >= ENOUGH:
        return True, f"The documents are long enough for {method}: {have}."
    return False, (
        f"The documents are short for {method}: {have}, so most samples join texts that have nothing to do with each "
        "other; give longer documents, data.document_ends=within, or a method that needs none (end_prompt)."
    )


def percent(share: float) -> str:
    """A share as 34.5%; what is only nearly 0% or 100% is not written so."""
    if 0 < share < 0.001:
        return "less than 0.1%"
    return "over 99.9%" if 0.999 < share < 1 else f"{share:.1%}"
