"""A rank's micro-batches: its own samples in the order of the run, stacked, and sliced for context parallelism.

Rows of packed documents are not stacked but joined, [1, b * s]: to the model a micro-batch of them is one long row of
sequences.  All tensor- and pipeline-parallel ranks of one data-parallel rank read the same samples; nothing is
broadcast.  Everything stays on the CPU.
"""

import torch

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.model.context_parallel import zigzag_indices, zigzag_slice

KEYS = ("tokens", "labels", "position_ids", "loss_weights", "prompt_mask")


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
