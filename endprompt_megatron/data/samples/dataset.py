"""The training and validation datasets of a run: windows of text made into samples, several sources blended.

stream.py reads a source's samples, or packed.py its rows of packed documents; blend.py says whose turn it is.
A sample is a pure function of (seed, source, number of the sample within its source), and the order of a run
is one sequence for all ranks: neither depends on how many samples are asked for, on the number of ranks, or on
where a run was resumed.  Every rank builds its own datasets and reads its own samples; rank 0 writes large
indices to the cache, which must lie where all ranks see it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.files import disk_errors
from endprompt_megatron.data.answers import KIND
from endprompt_megatron.data.dataset_tokenizer import refuse_other_tokenizer
from endprompt_megatron.data.indexed import Index, path_of, read_idx, read_manifest
from endprompt_megatron.data.samples.blend import turns
from endprompt_megatron.data.samples.builder import SampleBuilder
from endprompt_megatron.data.samples.conversations import (
    Conversations,
    refuse_other_kind,
    refuse_other_template,
)
from endprompt_megatron.data.samples.packed import Documents, PackedDataset, PackedRows
from endprompt_megatron.data.samples.stream import EndPromptDataset
from endprompt_megatron.data.samples.windows import Windows
from endprompt_megatron.method.recall import Recall

# (PREFIX, weight), or (PREFIX, weight, token ids of its own prompts).
Blend = list[tuple]


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


@dataclass(frozen=True)
class _Cut:
    """How every source of a run is cut and made into samples."""

    method: str
    physical_len: int
    target_len: int
    prompts: list[list[int]]
    prompt_loss_weight: float
    seed: int
    recall: Recall | None
    knobs: Mapping[str, int]  # of position_ids
    ends: str
    least: int
    align: int | None  # of packed documents; None for the stream
    kind: str
    long: str | None  # of conversations
    cache: Path | None
    vocab_size: int | None

    def builder(self, prompts: list[list[int]] | None, share: float, where: str) -> SampleBuilder:
        """The builder of a source that has `share` of the samples, and perhaps prompts of its own."""
        knobs = dict(self.knobs)
        if knobs.get("curriculum_samples"):
            # Samples are numbered within their source: all sources arrive at the end together.
            knobs["curriculum_samples"] = max(round(knobs["curriculum_samples"] * share), 1)
        builder = SampleBuilder(
            self.method,
            self.physical_len,
            self.target_len,
            self.prompts if prompts is None else prompts,
            self.prompt_loss_weight,
            self.seed,
            self.recall,
            **knobs,
        )
        if self.vocab_size is not None and builder.highest_prompt_id >= self.vocab_size:
            raise InputError(
                f"{where}: token id {builder.highest_prompt_id} is outside the model's vocabulary of "
                f"{self.vocab_size}; the tokenizer is not this model's"
            )
        return builder


def build_datasets(
    *,
    train: Blend,
    valid: Blend | str | None,
    physical_len: int,
    method: str,
    target_len: int,
    prompts: list[list[int]],
    prompt_loss_weight: float,
    seed: int,
    recall: Recall | None = None,
    knobs: Mapping[str, int] | None = None,
    train_samples: int,
    valid_samples: int = 0,
    cache_dir: Path | str | None = None,
    vocab_size: int | None = None,
    document_ends: str = "cross",
    min_document_tokens: int = 0,
    content_skip: bool = False,
    packing: str = "stream",
    align: int = 1,
    kind: str = "text",
    long: str | None = None,
    tokenizer: Path | str | None = None,
) -> tuple[Dataset, Dataset | None]:
    """The training and the validation dataset (None where `valid` is None or `valid_samples` 0).

    `train` and `valid` list (PREFIX, weight) or (PREFIX, weight, prompts); `valid` may instead split the documents of
    `train`, "99,1" giving the last hundredth to validation.  A dataset holds the samples asked for, over as many
    epochs as they take.  Prompts are token ids; `vocab_size` is the model's, `tokenizer` its directory,
    None to take any dataset's ids.  `cache_dir` keeps large indices (windows.py, packing.py), None keeps none.  With
    `packing` "documents" a sample is a row of them, each padded to a multiple of `align`; with `kind` "chat" they are
    conversations, and `long` says what becomes of those longer than a row (conversations.py).  `knobs` are further
    arguments of positions.position_ids; validation samples stand where a curriculum ends.  Works with torch.distributed
    and without; with it, all ranks must call.  Raises InputError, on every rank alike.
    """
    cut = _Cut(
        method=method,
        physical_len=physical_len,
        target_len=target_len,
        prompts=prompts,
        prompt_loss_weight=prompt_loss_weight,
        seed=seed,
        recall=recall,
        knobs=knobs or {},
        ends="single" if content_skip else document_ends,
        least=min_document_tokens,
        align=align if packing == "documents" else None,
        kind=kind,
        long=long,
        cache=None if cache_dir is None else Path(cache_dir),
        vocab_size=vocab_size,
    )
    if train_samples < 1:
        raise ValueError(f"train_samples={train_samples} should be at least 1")
    arrived = replace(cut, knobs={**cut.knobs, "curriculum_samples": 0})
    split = _checked_split(valid) if isinstance(valid, str) else None
    held_out_blend = valid if split is None and valid_samples else None
    if tokenizer is not None:
        blends = [("data.train", train), ("data.valid", held_out_blend or [])]
        refuse_other_tokenizer(blends, tokenizer)
        if kind == KIND:
            refuse_other_template(blends, tokenizer)
    if split is not None:
        train_set = _blended("data.train", train, cut, train_samples, (0.0, split))
        held_out = _blended("data.train", train, arrived, valid_samples, (split, 1.0)) if valid_samples else None
    else:
        train_set = _blended("data.train", train, cut, train_samples)
        held_out = _blended("data.valid", held_out_blend, arrived, valid_samples) if held_out_blend else None
    _prepare([dataset for dataset in (train_set, held_out) if dataset is not None], cut.cache)
    return train_set, held_out


def _blended(key: str, blend: Blend, cut: _Cut, samples: int, part: tuple[float, float] | None = None) -> Dataset:
    """A dataset of `samples` samples of a blend, or of the documents between two shares of each of its sources."""
    indices = [_check(key, prefix, cut.vocab_size) for prefix, *_ in blend]
    whose, number = turns([weight for _, weight, *_ in blend], samples)
    taken = np.bincount(whose, minlength=len(blend))
    whole = sum(weight for _, weight, *_ in blend)
    sources = []
    for (prefix, weight, *own), index, size in zip(blend, indices, taken.tolist(), strict=True):
        prompts = own[0] if own else None
        where = "context.prompts" if prompts is None else f"{key}: prompts of {prefix}"
        builder = cut.builder(prompts, weight / whole, where)
        first, stop = (round(share * len(index.lengths)) for share in part or (0.0, 1.0))
        named = "" if part is None else " for training" if part[0] == 0 else " for validation"
        answers = refuse_other_kind(key, prefix, cut.kind, index)
        if cut.align is not None:
            sources.append(_packed(f"{key}={prefix}", prefix, index, first, stop, builder, cut, size, named, answers))
            continue
        windows = Windows(
            index,
            builder.context_len,
            cut.seed,
            ends=cut.ends,
            least=cut.least,
            first=first,
            stop=stop,
            cache=cut.cache,
        )
        if not windows.count:
            _refuse_short(key, prefix, windows, cut, stop - first, named)
        sources.append(EndPromptDataset(prefix, index, windows, builder, size, cut.vocab_size))
    return sources[0] if len(sources) == 1 else BlendedDataset(sources, whose, number)


def _packed(
    key: str,
    prefix: str,
    index: Index,
    first: int,
    stop: int,
    builder: SampleBuilder,
    cut: _Cut,
    size: int,
    part: str,
    answers: np.ndarray | None,
) -> PackedDataset:
    """Rows of the documents first .. stop-1 of a dataset.  Raises InputError if there is not one sample in them."""
    packing = builder.packing(cut.align)
    stream = np.asarray(np.memmap(path_of(prefix, ".bin"), dtype=index.dtype, mode="r"))
    if answers is None:
        documents = Documents(stream, index, first, stop, cut.least)
    else:
        documents = Conversations(stream, index, first, stop, cut.least, answers, packing.piece_len, cut.long)
        if stop > first and not documents.lengths.any():
            raise InputError(
                f"{key}: none of {stop - first} conversations{part} fits into context.physical={packing.row_len}; "
                "raise it, or cut them (data.long=cut)"
            )
    if documents.lengths.max(initial=0) < packing.shortest:
        few = f" of at least {cut.least} tokens (data.min_document_tokens)" if cut.least else ""
        held = np.count_nonzero(documents.lengths), int(documents.lengths.sum(dtype=np.int64))
        raise InputError(
            f"{key}: {held[0]} documents{few} with {held[1]} tokens{part} are shorter than one sample, which takes "
            f"{packing.shortest}; give more text" + (", or data.valid its own" if part else "")
        )
    rows = PackedRows(documents, builder, packing, cut.cache, {"digest": index.digest, **documents.describe()})
    return PackedDataset(prefix, rows, size, cut.vocab_size)


def sources_in(dataset: Dataset) -> list[Source]:
    """The sources of a dataset of build_datasets, in the order of the recipe."""
    return dataset.sources if isinstance(dataset, BlendedDataset) else [dataset]


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


def _check(key: str, prefix: str, vocab_size: int | None) -> Index:
    """The index of a dataset that is whole and fits the model.  Raises InputError for any other."""
    index = read_idx(prefix)
    manifest = read_manifest(prefix) or {}
    for name, least in (("vocab_size", 1), ("max_token_id", 0)):
        value = manifest.get(name)
        if vocab_size is not None and isinstance(value, int) and value + 1 - least > vocab_size:
            raise InputError(
                f"{key}={prefix}: {name}={value} in its manifest does not fit the model's vocabulary of {vocab_size}; "
                "prepare the data with the model's own tokenizer"
            )
    return index


def _refuse_short(key: str, prefix: str, windows: Windows, cut: _Cut, documents: int, part: str) -> None:
    """Raise InputError for a dataset, or a part of one, that gives not one sample."""
    if cut.ends != "cross" and not windows.documents:
        raise InputError(
            f"{key}={prefix}: none of {documents} documents{part} has {max(cut.least, windows.size)} tokens, which "
            "data.document_ends=within asks of each; give longer documents, use cross, or lower context.physical"
        )
    few = f" of at least {cut.least} tokens (data.min_document_tokens)" if cut.least else ""
    mend = "give more text" + (", or data.valid its own" if part else "")
    raise InputError(
        f"{key}={prefix}: {windows.documents} documents{few} with {windows.tokens} tokens{part} are shorter than one "
        f"sample, which takes {windows.size}; {mend}, or lower context.physical"
    )
