"""The training and validation datasets of a run: windows of text made into samples, several sources blended.

stream.py reads a source's samples, or packed.py its rows of packed documents; blend.py says whose turn it is.
A sample is a pure function of (seed, source, number of the sample within its source), and the order of a run
is one sequence for all ranks: neither depends on how many samples are asked for, on the number of ranks, or on
where a run was resumed.  Every rank builds its own datasets and reads its own samples; rank 0 writes large
indices to the cache, which must lie where all ranks see it.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.files import disk_errors
from endprompt_megatron.data.compatibility import (
    refuse_other_kind,
    refuse_other_template,
    refuse_other_tokenizer,
    refuse_other_vocabulary,
)
from endprompt_megatron.data.indexed import CHAT, Index, path_of, read_idx, read_mask
from endprompt_megatron.data.samples.blend import turns
from endprompt_megatron.data.samples.builder import SampleBuilder, SampleSpec
from endprompt_megatron.data.samples.packed import Conversations, Documents, PackedDataset, PackedRows
from endprompt_megatron.data.samples.stream import EndPromptDataset
from endprompt_megatron.data.samples.windows import Windows


@dataclass(frozen=True)
class WeightedDataset:
    """An indexed dataset in a blend; `prompts` are token ids of its own prompts, None for those of the run."""

    prefix: str
    weight: float = 1.0
    prompts: list[list[int]] | None = None


@dataclass(frozen=True)
class DataSpec:
    """Where samples come from, as a recipe's data says it.

    `valid` may split the documents of `train` instead of naming datasets: "99,1" gives the last hundredth to
    validation.  With `content_skip` a sample takes its two chunks from different places of one document.  With
    `packing` "documents" a sample is a row of documents, each padded to a multiple of `align`.  With `kind` "chat" they
    are conversations, and `long` says what becomes of those longer than a row (packed.Conversations).
    """

    train: list[WeightedDataset]
    valid: list[WeightedDataset] | str | None = None
    document_ends: str = "cross"
    min_document_tokens: int = 0
    content_skip: bool = False
    packing: str = "stream"
    align: int = 1
    kind: str = "text"
    long: str | None = None

    @property
    def ends(self) -> str:
        """How windows are cut: see windows.py."""
        return "single" if self.content_skip else self.document_ends


class BlendedDataset(torch.utils.data.Dataset):
    """Samples of several sources, `size` of them, each source's in its own order, in turns by weight."""

    def __init__(self, sources: list["Source"], source: np.ndarray, number: np.ndarray) -> None:
        self.sources, self.source, self._number = sources, source, number

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        dataset, number = self.locate(index)
        return dataset[number]

    def locate(self, index: int) -> tuple["Source", int]:
        """The source of sample `index`, and the sample's number there."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self.sources[self.source[index]], int(self._number[index])


Source = EndPromptDataset | PackedDataset
Dataset = Source | BlendedDataset


def build_datasets(
    sample: SampleSpec,
    data: DataSpec,
    train_samples: int,
    valid_samples: int = 0,
    *,
    vocab_size: int | None = None,
    tokenizer: Path | str | None = None,
    cache_dir: Path | str | None = None,
) -> tuple[Dataset, Dataset | None]:
    """The training and the validation dataset (None where `data.valid` is None or `valid_samples` 0).

    A dataset holds the samples asked for, over as many epochs as they take; validation samples stand where a
    curriculum ends.  `vocab_size` is the model's, `tokenizer` its directory, None to take any dataset's ids.
    `cache_dir` keeps large indices (windows.py, packing.py), None keeps none.  Works with torch.distributed and
    without; with it, all ranks must call.  Raises InputError, on every rank alike.
    """
    if train_samples < 1:
        raise ValueError(f"train_samples={train_samples} should be at least 1")
    train = _Blend("data.train", data.train, sample, data, vocab_size, None if cache_dir is None else Path(cache_dir))
    valid = None
    settled = replace(sample, knobs={**sample.knobs, "curriculum_samples": 0})
    if isinstance(data.valid, str):
        share = _checked_split(data.valid)
        train = replace(train, part=_Part(0.0, share, " for training"))
        valid = replace(train, sample=settled, part=_Part(share, 1.0, " for validation"))
    elif data.valid is not None:
        valid = replace(train, key="data.valid", datasets=data.valid, sample=settled)
    if valid_samples == 0:
        valid = None
    if tokenizer is not None:
        blends = [train] if valid is None or isinstance(data.valid, str) else [train, valid]
        prefixes = [(blend.key, each.prefix) for blend in blends for each in blend.datasets]
        refuse_other_tokenizer(prefixes, tokenizer)
        if data.kind == CHAT:
            refuse_other_template(prefixes, tokenizer)
    train_set = train.build(train_samples)
    valid_set = None if valid is None else valid.build(valid_samples)
    _prepare([each for each in (train_set, valid_set) if each is not None], train.cache)
    return train_set, valid_set


@dataclass(frozen=True)
class _Part:
    """The documents of a dataset between two shares of it; `purpose` names them in messages."""

    begin: float = 0.0
    end: float = 1.0
    purpose: str = ""


@dataclass(frozen=True)
class _Blend:
    """What a training or validation dataset is built of; `key` names it in messages."""

    key: str
    datasets: list[WeightedDataset]
    sample: SampleSpec
    data: DataSpec
    vocab_size: int | None
    cache: Path | None
    part: _Part = _Part()

    def build(self, samples: int) -> Dataset:
        """A dataset of `samples` samples."""
        indices = [self._index(each.prefix) for each in self.datasets]
        whose, number = turns([each.weight for each in self.datasets], samples)
        sizes = np.bincount(whose, minlength=len(self.datasets)).tolist()
        build = self._packed if self.data.packing == "documents" else self._stream
        sources = [
            build(each.prefix, index, self._builder(each), size)
            for each, index, size in zip(self.datasets, indices, sizes, strict=True)
        ]
        return sources[0] if len(sources) == 1 else BlendedDataset(sources, whose, number)

    def _index(self, prefix: str) -> Index:
        """The index of a dataset that is complete and fits the model.  Raises InputError for any other."""
        index = read_idx(prefix)
        if self.vocab_size is not None:
            refuse_other_vocabulary(self.key, prefix, self.vocab_size)
        refuse_other_kind(self.key, prefix, self.data.kind)
        return index

    def _bounds(self, index: Index) -> tuple[int, int]:
        """The first of its documents that are used, and the first after them."""
        count = len(index.lengths)
        return round(self.part.begin * count), round(self.part.end * count)

    def _builder(self, dataset: WeightedDataset) -> SampleBuilder:
        """What makes the samples of a dataset, perhaps with prompts of its own."""
        sample, where = self.sample, "context.prompts"
        if dataset.prompts is not None:
            sample, where = replace(sample, prompts=dataset.prompts), f"{self.key}: prompts of {dataset.prefix}"
        if curriculum := sample.knobs.get("curriculum_samples"):
            # Samples are numbered within their source: all sources arrive at the end together.
            share = dataset.weight / sum(each.weight for each in self.datasets)
            knobs = {**sample.knobs, "curriculum_samples": max(round(curriculum * share), 1)}
            sample = replace(sample, knobs=knobs)
        builder = SampleBuilder(sample)
        if self.vocab_size is not None and builder.highest_prompt_id >= self.vocab_size:
            raise InputError(
                f"{where}: token id {builder.highest_prompt_id} is outside the model's vocabulary of "
                f"{self.vocab_size}; the tokenizer is not this model's"
            )
        return builder

    def _stream(self, prefix: str, index: Index, builder: SampleBuilder, size: int) -> EndPromptDataset:
        """Samples of a dataset's windows.  Raises InputError if there is not one window."""
        data, (first, stop) = self.data, self._bounds(index)
        windows = Windows(
            index,
            builder.context_len,
            self.sample.seed,
            ends=data.ends,
            min_len=data.min_document_tokens,
            first=first,
            stop=stop,
            cache=self.cache,
        )
        if not windows.count:
            self._refuse_short(prefix, windows, stop - first)
        return EndPromptDataset(prefix, index, windows, builder, size, self.vocab_size)

    def _packed(self, prefix: str, index: Index, builder: SampleBuilder, size: int) -> PackedDataset:
        """Rows of a dataset's documents.  Raises InputError if there is not one sample in them."""
        data, (first, stop) = self.data, self._bounds(index)
        packing = builder.packing(data.align)
        stream = np.asarray(np.memmap(path_of(prefix, ".bin"), dtype=index.dtype, mode="r"))
        chosen = (stream, index, first, stop, data.min_document_tokens)
        if data.kind == CHAT:
            documents = Conversations(*chosen, read_mask(prefix, index), packing.piece_len, data.long)
            if stop > first and not documents.lengths.any():
                raise InputError(
                    f"{self.key}={prefix}: none of {stop - first} conversations{self.part.purpose} fits into "
                    f"context.physical={packing.row_len}; raise it, or cut them (data.long=cut)"
                )
        else:
            documents = Documents(*chosen)
        if documents.lengths.max(initial=0) < packing.shortest:
            held = np.count_nonzero(documents.lengths), int(documents.lengths.sum(dtype=np.int64))
            raise InputError(
                f"{self.key}={prefix}: {self._too_few(*held)}, which takes {packing.shortest}; {self._remedy()}"
            )
        identity = {"digest": index.digest, **documents.identity()}
        rows = PackedRows(documents, builder, packing, self.cache, identity)
        return PackedDataset(prefix, rows, size, self.vocab_size)

    def _refuse_short(self, prefix: str, windows: Windows, documents: int) -> None:
        """Raise InputError for a dataset, or a part of one, that gives not one sample."""
        if self.data.ends != "cross" and not windows.documents:
            raise InputError(
                f"{self.key}={prefix}: none of {documents} documents{self.part.purpose} has "
                f"{max(self.data.min_document_tokens, windows.size)} tokens, which data.document_ends=within asks of "
                "each; give longer documents, use cross, or lower context.physical"
            )
        raise InputError(
            f"{self.key}={prefix}: {self._too_few(windows.documents, windows.tokens)}, which takes {windows.size}; "
            f"{self._remedy()}, or lower context.physical"
        )

    def _too_few(self, documents: int, tokens: int) -> str:
        shortest = self.data.min_document_tokens
        of = f" of at least {shortest} tokens (data.min_document_tokens)" if shortest else ""
        return f"{documents} documents{of} with {tokens} tokens{self.part.purpose} are shorter than one sample"

    def _remedy(self) -> str:
        return "give more text" + (", or data.valid its own" if self.part.purpose else "")


def sources_in(dataset: Dataset) -> list[Source]:
    """The sources of a dataset of build_datasets, in the order of the recipe."""
    return dataset.sources if isinstance(dataset, BlendedDataset) else [dataset]


def consumed(dataset: Dataset, samples: int) -> dict[str, Any]:
    """{"consumed_samples", "sources": [...]} of the first `samples` samples of a training dataset.

    A source has prefix, samples, share (of the samples), context_tokens, prompt_tokens, epochs (its samples over those
    of an epoch), and what an epoch of it has: epoch_samples, epoch_documents, left_out_tokens (in no sample).  Where
    documents are packed a sample is a row, and packed_documents counts what is in them, pieces of long ones each.
    The counts follow from the order of the run, not from what a process happened to read, so they are exact after any
    number of stops, and on any number of ranks.
    """
    samples = min(samples, len(dataset))
    sources, counts = sources_in(dataset), [samples]
    if isinstance(dataset, BlendedDataset):
        counts = np.bincount(dataset.source[:samples], minlength=len(sources)).tolist()
    listed = [
        {"prefix": source.prefix, "samples": count, "share": count / samples if samples else 0.0, **source.taken(count)}
        for source, count in zip(sources, counts, strict=True)
    ]
    return {"consumed_samples": samples, "sources": listed}


def _prepare(datasets: list[Dataset], cache: Path | None) -> None:
    """Let rank 0 write what belongs into the cache before the others look for it."""
    from endprompt_megatron.distributed import runtime

    def write() -> None:
        with disk_errors(cache, "data.cache"):
            for dataset in datasets:
                for source in sources_in(dataset):
                    source.prepare()

    if cache is None:
        return
    if not torch.distributed.is_initialized():
        write()
        return
    with runtime.raise_on_all_ranks():
        if runtime.is_rank_zero():
            write()


def _checked_split(valid: str) -> float:
    """The share of the documents that stays for training."""
    shares = valid.split(",")
    if len(shares) != 2 or not all(share.strip().isdigit() and int(share) > 0 for share in shares):
        raise InputError(f"data.valid={valid}: a split has two whole numbers above 0, such as 99,1")
    return int(shares[0]) / (int(shares[0]) + int(shares[1]))
