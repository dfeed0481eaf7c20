"""Which tokens of a sequence each context-parallel rank holds: its zigzag share.  Pure functions of lengths and ranks.

data/ slices samples with it; attention.py and validation put the shares back into physical order.
"""

import functools
import itertools
from collections.abc import Sequence

import torch


def zigzag_slice(tensor: torch.Tensor, cp_rank: int, cp_size: int, dim: int) -> torch.Tensor:
    """This rank's share of a sequence under context parallelism, Megatron's way.

    The sequence (`dim`) is cut into 2*cp_size chunks and rank r takes chunks r and 2*cp_size-1-r: under
    causal attention every rank then has the same work.  Identity for cp_size 1.  Raises ValueError if
    2*cp_size does not divide the length.
    """
    if cp_size == 1:
        return tensor
    length = tensor.shape[dim]
    if length % (2 * cp_size):
        raise ValueError(f"2 x context parallel size = {2 * cp_size} does not divide the sequence length {length}")
    chunks = tensor.chunk(2 * cp_size, dim=dim)
    return torch.cat((chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]), dim=dim)


def zigzag_indices(bounds: Sequence[int], cp_rank: int, cp_size: int) -> torch.Tensor:
    """Where this rank's tokens stand in a row of sequences, int64 [s / cp_size]: its zigzag share of each.

    bounds: where each sequence begins, with the row's length at the end.  Raises ValueError as zigzag_slice does.
    """
    row = torch.arange(bounds[-1])
    return torch.cat([zigzag_slice(row[a:b], cp_rank, cp_size, dim=0) for a, b in itertools.pairwise(bounds)])


@functools.lru_cache(maxsize=8)
def rank_order(bounds: tuple[int, ...], ranks: int) -> torch.Tensor:
    """Where the tokens of all ranks' shares stand in the row, one rank after the other, int64 [s]."""
    return torch.cat([zigzag_indices(bounds, rank, ranks) for rank in range(ranks)])
