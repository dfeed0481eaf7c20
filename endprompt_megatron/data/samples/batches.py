"""A rank's micro-batches: its own samples in the order of the run, stacked, and sliced for context parallelism.

Rows of packed documents are not stacked but joined, [1, b * s]: to the model a micro-batch of them is one long row of
sequences.  All tensor- and pipeline-parallel ranks of one data-parallel rank read the same samples; nothing is
broadcast.  Everything stays on the CPU.
"""

import functools
import itertools
from collections.abc import Sequence

import torch

from endprompt_megatron.common.errors import InputError

KEYS = ("tokens", "labels", "position_ids", "loss_weights", "prompt_mask")


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


def join_rows(rows: list[dict[str, torch.Tensor]], cp_rank: int = 0, cp_size: int = 1) -> dict[str, torch.Tensor]:
    """A micro-batch [1, b * s / cp_size] of packed rows, with `cu_seqlens` of all its sequences, before slicing."""
    bounds = [0]
    for row in rows:
        bounds += (row["cu_seqlens"][1:] + bounds[-1]).tolist()
    batch = {key: torch.cat([row[key] for row in rows])[None] for key in KEYS}
    if cp_size > 1:
        mine = zigzag_indices(bounds, cp_rank, cp_size)
        batch = {key: value[:, mine] for key, value in batch.items()}
    return {**batch, "cu_seqlens": torch.tensor(bounds, dtype=torch.int32)}


class MicroBatches:
    """Iterator over one rank's micro-batches; `consumed_samples` is where the run stands, over all ranks.

    Micro-batch m gives data-parallel rank r the samples consumed + (m * dp_size + r) * micro_batch_size + [0 ..
    micro_batch_size).  Each is a dict of the sample's tensors stacked to [b, s] (s / cp_size under context
    parallelism), or of packed rows joined by `join_rows`.  Raises InputError past the end of the dataset: a run asks
    for as many samples as it needs.
    """

    def __init__(
        self,
        dataset: torch.utils.data.Dataset,
        consumed_samples: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        cp_rank: int = 0,
        cp_size: int = 1,
    ) -> None:
        if not (0 <= dp_rank < dp_size and 0 <= cp_rank < cp_size):
            raise ValueError(f"data rank {dp_rank} of {dp_size}, context rank {cp_rank} of {cp_size}")
        self._dataset = dataset
        self._next = consumed_samples + dp_rank * micro_batch_size
        self._size, self._stride = micro_batch_size, micro_batch_size * dp_size
        self._cp_rank, self._cp_size = cp_rank, cp_size

    def __iter__(self) -> "MicroBatches":
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        first, last = self._next, self._next + self._size - 1
        if last >= len(self._dataset):
            raise InputError(
                f"sample {last} was asked for, but the dataset was built with {len(self._dataset)} samples: the run is "
                "longer than the data was set up for"
            )
        samples = [self._dataset[index] for index in range(first, first + self._size)]
        self._next += self._stride
        if "cu_seqlens" in samples[0]:
            return join_rows(samples, self._cp_rank, self._cp_size)
        return {
            key: zigzag_slice(torch.stack([sample[key] for sample in samples]), self._cp_rank, self._cp_size, dim=1)
            for key in KEYS
        }
