"""Rows of packed documents (`data.packing: documents`), read from an indexed dataset by the index of packing.py.

A row is as long as a sample of the stream and holds several two-segment samples, one after the other, each with
positions, prompt and weights of its own; `cu_seqlens` says where each begins.  Padding stands at the end of a sample,
where no real token sees it, and has weight 0; what is left of the row is one more sequence, of weight 0 throughout.
"""

import bisect
from pathlib import Path
from typing import Any

import numpy as np
import torch

from endprompt_megatron.data.indexed import Index
from endprompt_megatron.data.samples.builder import Excerpt, SampleBuilder, check_vocabulary
from endprompt_megatron.data.samples.packing import (
    Counts,
    Epoch,
    Packing,
    cached_epoch,
    pack_epoch,
    piece_size,
    piece_sizes,
)

_DTYPES = {
    "tokens": np.int64,
    "labels": np.int64,
    "position_ids": np.int64,
    "loss_weights": np.float32,
    "prompt_mask": np.bool_,
}


class Documents:
    """The documents first .. stop-1 of an indexed dataset; those below `min_len` tokens count as empty.

    `stream`: the tokens of the whole dataset, memory-mapped; `lengths`: tokens of each of these documents.
    """

    def __init__(self, stream: np.ndarray, index: Index, first: int, stop: int, min_len: int = 0) -> None:
        self.stream, self._index, self.first, self._stop, self._min_len = stream, index, first, stop, min_len
        lengths = index.lengths[first:stop]
        self.tokens = int(lengths.sum(dtype=np.int64))
        self.lengths = np.where(lengths >= min_len, lengths, 0) if min_len else lengths

    def begin(self, document: int) -> int:
        """Where a document begins in the stream, in tokens."""
        return int(self._index.pointers[self.first + document]) // self.stream.itemsize

    def length(self, document: int) -> int:
        """Tokens of a document, including those that no sample takes."""
        return int(self._index.lengths[self.first + document])

    def weigh(self, row: dict[str, np.ndarray], begin: int) -> None:
        """Change the weights of a sample that was written into the views `row`; its tokens begin at `begin`."""

    def identity(self) -> dict:
        """What tells these documents from others of the same dataset, as the cache of packed epochs notes it."""
        return {"documents": [self.first, self._stop], "least": self._min_len}

    def left_out(self) -> str:
        """What is left out or cut besides what the rows' counts say, for the line that describes an epoch."""
        return ""


class Conversations(Documents):
    """Documents of which only the answers are supervised (`data.kind: chat`): each complete, cut or left out.

    One of more than `max_len` tokens counts as empty (`long` "drop"), or is its first `max_len` tokens ("cut"), if
    there is an answer to learn among them.  `answers`: the mask of the whole dataset, uint8 [tokens].
    """

    def __init__(
        self,
        stream: np.ndarray,
        index: Index,
        first: int,
        stop: int,
        min_len: int,
        answers: np.ndarray,
        max_len: int,
        long: str,
    ) -> None:
        super().__init__(stream, index, first, stop, min_len)
        self._answers, self._max_len, self._long = answers, max_len, long
        self._too_long = np.flatnonzero(self.lengths > max_len)
        self.lengths = np.where(self.lengths > max_len, 0 if long == "drop" else max_len, self.lengths)
        if long == "cut":
            for document in self._too_long.tolist():
                begin = self.begin(document)
                if not answers[begin + 1 : begin + max_len].any():
                    self.lengths[document] = 0

    def weigh(self, row: dict[str, np.ndarray], begin: int) -> None:
        size = len(row["tokens"])
        # The target at i is token i + 1.
        row["loss_weights"][:-1] = self._answers[begin + 1 : begin + size]

    def identity(self) -> dict:
        return {**super().identity(), "long": self._long}

    def left_out(self) -> str:
        count = len(self._too_long)
        if not count:
            return ""
        cut = int(np.count_nonzero(self.lengths[self._too_long]))
        parts = [f"{cut:,} cut"] * bool(cut) + [f"{count - cut:,} left out"] * (count > cut)
        return f"; of {count:,} conversations longer than {self._max_len:,} tokens {', '.join(parts)}"


class PackedRows:
    """Rows of the documents, one epoch after the other, packed as they are asked for.

    `cache` is the directory of packed epochs, None to keep them in memory; `source` (JSON) names the documents there.
    """

    def __init__(
        self, documents: Documents, builder: SampleBuilder, packing: Packing, cache: Path | None, source: dict
    ) -> None:
        self._documents, self.builder, self.packing = documents, builder, packing
        self._cache, self._source = cache, source
        self._epochs: list[Epoch] = []
        self._ends: list[int] = []  # rows up to the end of each epoch
        self._before = [0]  # samples up to its beginning

    def prepare(self, rows: int) -> int:
        """Pack, or find in the cache, at least one epoch and at least so many rows; how many there are then."""
        while not self._epochs or self._ends[-1] < rows:
            what = self._documents.lengths, self.packing, len(self._epochs)
            epoch = cached_epoch(*what, self._cache, self._source) if self._cache else pack_epoch(*what)
            self._epochs.append(epoch)
            self._ends.append((self._ends or [0])[-1] + epoch.counts.rows)
            self._before.append(self._before[-1] + epoch.counts.samples)
        return self._ends[-1]

    @property
    def counts(self) -> Counts:
        """What the first epoch holds; the others differ in their prompts, and by a row or two."""
        self.prepare(1)
        return self._epochs[0].counts

    def epoch(self, row: int) -> int:
        """Which epoch, from 0, a row belongs to."""
        self.prepare(row + 1)
        return bisect.bisect_right(self._ends, row)

    def taken(self, rows: int) -> dict[str, Any]:
        """What the first rows hold, and what an epoch has: see dataset.consumed."""
        counts = self.counts
        self.prepare(rows)
        context = prompt = samples = 0
        epochs = 0.0
        for epoch in self._epochs:
            if not rows:
                break
            taken = min(rows, epoch.counts.rows)
            chosen = epoch.samples[: epoch.starts[taken]]
            sizes = piece_sizes(self._documents.lengths[chosen["document"]], chosen["piece"], self.packing)
            context += int(sizes.sum(dtype=np.int64))
            prompt += int(np.array(self.packing.prompt_lens)[chosen["prompt"]].sum(dtype=np.int64))
            samples += len(chosen)
            epochs += taken / epoch.counts.rows
            rows -= taken
        return {
            "context_tokens": context,
            "prompt_tokens": prompt,
            "packed_documents": samples,
            "epochs": epochs,
            "epoch_samples": counts.rows,
            "epoch_documents": int(np.count_nonzero(self._documents.lengths)),
            "left_out_tokens": self._documents.tokens - counts.context_tokens,
        }

    def excerpts(self, row: int) -> list[Excerpt]:
        """The context of each sample of a row."""
        found, at = [], 0
        for _, document, first, size, prompt in self.samples(row):
            length = self._documents.length(document)
            found.append(Excerpt(self._documents.first + document, length, first, size, at))
            at += -(-(size + self.packing.prompt_lens[prompt]) // self.packing.align) * self.packing.align
        return found

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
            f"{counts.efficiency(length):.2%} of them real{left_out}{self._documents.left_out()}"
        )

    def samples(self, row: int) -> list[tuple[int, int, int, int, int]]:
        """(number, document, first token, tokens, prompt) of each sample of a row; numbers never repeat."""
        number = self.epoch(row)
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
            begin = self._documents.begin(document) + first
            views = {key: array[start : start + real] for key, array in arrays.items()}
            self.builder.write(views, stream[begin : begin + size], prompt, number)
            self._documents.weigh(views, begin)
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

    @property
    def builder(self) -> SampleBuilder:
        """What makes the samples of a row."""
        return self.rows.builder

    def locate(self, index: int) -> tuple["PackedDataset", int]:
        """The source of row `index`, and the row's number there: this one."""
        return self, int(index)

    def prepare(self) -> None:
        """Pack the rows that were asked for, or find them in the cache."""
        self.rows.prepare(self.size)

    def epoch(self, number: int) -> int:
        """Which epoch, from 0, row `number` belongs to."""
        return self.rows.epoch(number)

    def excerpts(self, number: int) -> list[Excerpt]:
        """What the contexts of row `number` consist of: see PackedRows.excerpts."""
        return self.rows.excerpts(number)

    def recalled(self, number: int) -> list[int]:
        """Nothing: packed documents have no recall prompts."""
        return []

    def taken(self, samples: int) -> dict[str, Any]:
        """What the first `samples` rows hold: see PackedRows.taken."""
        return self.rows.taken(samples)

    def describe(self) -> str:
        """What an epoch is, in a line."""
        return self.rows.describe(self.prefix)


def context_tokens(row: dict[str, torch.Tensor]) -> torch.Tensor:
    """Context tokens of a row's samples, one after the other, int64: no prompts, no padding."""
    has_target, to_prompt = row["loss_weights"] > 0, row["prompt_mask"]
    # The target at i is token i + 1, and a sample's last token has none: nothing is carried into the next one.
    is_target = torch.cat((has_target.new_zeros(1), has_target[:-1]))
    is_prompt = torch.cat((to_prompt.new_zeros(1), to_prompt[:-1]))
    return row["tokens"][(has_target | is_target) & ~is_prompt]
