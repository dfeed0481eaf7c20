"""Rows of packed documents (`data.packing: documents`), read from an indexed dataset by the index of packing.py.

A row is as long as a sample of the stream and holds several two-segment samples, one behind the other, each with
positions, prompt and weights of its own; `cu_seqlens` says where each begins.  What pads a sample to its alignment
stands at its end, where no real token sees it, and has weight 0; what is left of the row is one more sequence, of
weight 0 throughout.
"""

import bisect
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from endprompt_megatron.data.packing import Counts, Epoch, Packing, cached_epoch, piece_size
from endprompt_megatron.data.samples import SampleBuilder, check_vocabulary

_DTYPES = {
    "tokens": np.int64,
    "labels": np.int64,
    "position_ids": np.int64,
    "loss_weights": np.float32,
    "prompt_mask": np.bool_,
}


@dataclass(frozen=True)
class Documents:
    """Tokens of documents, all memory-mapped: document d has lengths[d] tokens, from byte pointers[d] of the stream."""

    stream: np.ndarray
    pointers: np.ndarray
    lengths: np.ndarray


class PackedRows:
    """Rows of the documents, one epoch after the other, packed as they are asked for.

    `cache` is the directory of packed epochs, `source` (JSON) what names the documents there.
    """

    def __init__(
        self, documents: Documents, builder: SampleBuilder, packing: Packing, cache: Path, source: dict
    ) -> None:
        self._documents, self._builder, self.packing = documents, builder, packing
        self._cache, self._source = cache, source
        self._epochs: list[Epoch] = []
        self._ends: list[int] = []  # rows up to the end of each epoch
        self._before = [0]  # samples up to its beginning

    def prepare(self, rows: int) -> int:
        """Pack, or find in the cache, at least one epoch and at least so many rows; how many there are then."""
        while not self._epochs or self._ends[-1] < rows:
            epoch = cached_epoch(self._documents.lengths, self.packing, len(self._epochs), self._cache, self._source)
            self._epochs.append(epoch)
            self._ends.append((self._ends or [0])[-1] + epoch.counts.rows)
            self._before.append(self._before[-1] + epoch.counts.samples)
        return self._ends[-1]

    @property
    def counts(self) -> Counts:
        """What the first epoch holds; the others differ in their prompts, and by a row or two."""
        self.prepare(1)
        return self._epochs[0].counts

    def describe(self, prefix: str) -> str:
        """What an epoch of the dataset at `prefix` is, in a line."""
        counts, length, left_out = self.counts, self.packing.row_len, ""
        if counts.left_out:
            left_out = (
                f"; {counts.left_out:,} tokens left out in {counts.left_out_pieces:,} pieces shorter than "
                f"{self.packing.shortest}"
            )
        return (
            f"{prefix}: an epoch is {counts.samples:,} samples in {counts.rows:,} rows of {length:,} tokens, "
            f"{counts.efficiency(length):.2%} of them real{left_out}"
        )

    def samples(self, row: int) -> list[tuple[int, int, int, int, int]]:
        """(number, document, first token, tokens, prompt) of each sample of a row; numbers never repeat."""
        self.prepare(row + 1)
        number = bisect.bisect_right(self._ends, row)
        epoch = self._epochs[number]
        inside = row - (self._ends[number - 1] if number else 0)
        first, last = epoch.starts[inside : inside + 2].tolist()
        found = []
        for at, (document, piece, prompt) in enumerate(epoch.samples[first:last].tolist(), first):
            size = piece_size(int(self._documents.lengths[document]), piece, self.packing)
            found.append((self._before[number] + at, document, piece * self.packing.piece_len, size, prompt))
        return found

    def row(self, row: int) -> tuple[dict[str, np.ndarray], list[int]]:
        """The arrays of a row [s], and where each of its sequences begins, with the row's length at the end."""
        length, align, stream = self.packing.row_len, self.packing.align, self._documents.stream
        arrays = {key: np.zeros(length, dtype=dtype) for key, dtype in _DTYPES.items()}
        bounds = [0]
        for number, document, first, size, prompt in self.samples(row):
            start, real = bounds[-1], size + self.packing.prompt_lens[prompt]
            begin = int(self._documents.pointers[document]) // stream.itemsize + first
            views = {key: array[start : start + real] for key, array in arrays.items()}
            self._builder.write(views, stream[begin : begin + size], prompt, number)
            bounds.append(start + -(-real // align) * align)
        if bounds[-1] < length:
            bounds.append(length)
        return arrays, bounds


class PackedDataset(torch.utils.data.Dataset):
    """`size` rows as a dataset; row `index` is pure in (seed, index).

    `vocab_size` is the model's, None to leave ids unchecked; `prefix` is named where one is wrong.
    """

    def __init__(self, prefix: str, rows: PackedRows, size: int, vocab_size: int | None = None) -> None:
        self.prefix, self.rows, self.size, self._vocab_size = prefix, rows, size, vocab_size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Row `index`: what SampleBuilder.build returns for one sample, and `cu_seqlens` int32 [sequences + 1].

        Raises InputError for a token that the model does not know.
        """
        index = int(index)
        if not 0 <= index < self.size:
            raise IndexError(f"row {index} of {self.size}")
        arrays, bounds = self.rows.row(index)
        check_vocabulary(arrays["tokens"], self._vocab_size, f"{self.prefix}.bin")
        row = {key: torch.from_numpy(array) for key, array in arrays.items()}
        return {**row, "cu_seqlens": torch.tensor(bounds, dtype=torch.int32)}


def context_tokens(row: dict[str, torch.Tensor]) -> torch.Tensor:
    """Context tokens of a row's samples, one after the other, int64: no prompts, no padding."""
    has_target, to_prompt = row["loss_weights"] > 0, row["prompt_mask"]
    # The target at i is token i + 1, and a sample's last token has none: nothing is carried into the next one.
    is_target = torch.cat((has_target.new_zeros(1), has_target[:-1]))
    is_prompt = torch.cat((to_prompt.new_zeros(1), to_prompt[:-1]))
    return row["tokens"][(has_target | is_target) & ~is_prompt]
