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
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.megatron_dataset import MegatronDataset

from endprompt_megatron.data.indexed import path_of
from endprompt_megatron.data.packing import Counts, Packing, cached_epoch, piece_size
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
    """At least `rows` rows of the documents, over as many whole epochs as they take.

    `cache` is the directory of packed epochs, `source` (JSON) what names the documents there.
    """

    def __init__(
        self, documents: Documents, builder: SampleBuilder, packing: Packing, rows: int, cache: Path, source: dict
    ) -> None:
        self._documents, self._builder, self.packing = documents, builder, packing
        self._epochs, self._ends, self._before = [], [], [0]
        while not self._epochs or self._ends[-1] < rows:
            epoch = cached_epoch(documents.lengths, packing, len(self._epochs), cache, source)
            self._epochs.append(epoch)
            self._ends.append((self._ends or [0])[-1] + epoch.counts.rows)
            self._before.append(self._before[-1] + epoch.counts.samples)

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def counts(self) -> Counts:
        """What the first epoch holds; the others differ in their prompts alone, and in a row or two."""
        return self._epochs[0].counts

    def samples(self, row: int) -> list[tuple[int, int, int, int, int]]:
        """(number, document, first token, tokens, prompt) of each sample of a row; numbers never repeat."""
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


class PackedDataset(MegatronDataset):
    """PackedRows as Megatron's dataset builder and blends want them; row `index` is pure in (seed, index)."""

    # How the builder opens a dataset and splits its documents is the same as for the stream.
    numel_low_level_dataset = staticmethod(GPTDataset.numel_low_level_dataset)
    build_low_level_dataset = staticmethod(GPTDataset.build_low_level_dataset)

    def __init__(self, indexed_dataset, dataset_path, indexed_indices, num_samples, index_split, config) -> None:
        super().__init__(indexed_dataset, dataset_path, indexed_indices, num_samples, index_split, config)
        index = indexed_dataset.index
        first, count = int(indexed_indices[0]), len(indexed_indices)
        span = slice(first, first + count)
        documents = Documents(
            stream=np.asarray(np.memmap(path_of(dataset_path, ".bin"), dtype=index.dtype, mode="r")),
            pointers=np.asarray(index.sequence_pointers)[span],
            lengths=np.asarray(index.sequence_lengths)[span],
        )
        source = {"digest": config.tokenizer.unique_identifiers[dataset_path], "documents": [first, count]}
        self.rows = PackedRows(
            documents,
            config.builder,
            config.builder.packing(config.align),
            num_samples or 1,
            Path(config.path_to_cache),
            source,
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Row `index`: what SampleBuilder.build returns for one sample, and `cu_seqlens` int32 [sequences + 1].

        Raises InputError for a token that the model does not know.
        """
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        arrays, bounds = self.rows.row(index)
        check_vocabulary(arrays["tokens"], self.config.vocab_size, f"{self.dataset_path}.bin")
        row = {key: torch.from_numpy(array) for key, array in arrays.items()}
        return {**row, "cu_seqlens": torch.tensor(bounds, dtype=torch.int32)}


def describe(dataset: torch.utils.data.Dataset) -> list[str]:
    """A line for each PREFIX of a packed dataset: what an epoch of it is.  No line for other datasets."""
    lines = []
    for each in getattr(dataset, "datasets", [dataset]):
        if not isinstance(each, PackedDataset):
            continue
        counts, length = each.rows.counts, each.rows.packing.row_len
        left_out = ""
        if counts.left_out:
            left_out = (
                f"; {counts.left_out:,} tokens left out in {counts.left_out_pieces:,} pieces shorter than "
                f"{each.rows.packing.shortest}"
            )
        lines.append(
            f"{each.dataset_path}: an epoch is {counts.samples:,} samples in {counts.rows:,} rows of {length:,} "
            f"tokens, {counts.efficiency(length):.2%} of them real{left_out}"
        )
    return lines


def context_tokens(row: dict[str, torch.Tensor]) -> torch.Tensor:
    """Context tokens of a row's samples, one after the other, int64: no prompts, no padding."""
    has_target, to_prompt = row["loss_weights"] > 0, row["prompt_mask"]
    # The target at i is token i + 1, and a sample's last token has none: nothing is carried into the next one.
    is_target = torch.cat((has_target.new_zeros(1), has_target[:-1]))
    is_prompt = torch.cat((to_prompt.new_zeros(1), to_prompt[:-1]))
    return row["tokens"][(has_target | is_target) & ~is_prompt]
