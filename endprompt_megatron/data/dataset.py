"""The two-segment dataset over Megatron-Core's GPT dataset: blends, splits, epochs and cached indices are its.

Megatron cuts the stream of documents into windows of a tokens and shuffles them; EndPromptDataset makes a
sample of each window with samples.py.  A window's last token has the end prompt as its target, so windows
do not overlap.  Every rank builds its own dataset and reads its own samples; rank 0 writes the index
cache, which must lie where all ranks see it.
"""

import contextlib
import copy
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from endprompt_megatron.data.fingerprint import refuse_other_tokenizer
from endprompt_megatron.data.indexed import Index, path_of, read_idx, read_manifest
from endprompt_megatron.data.samples import SampleBuilder
from endprompt_megatron.errors import InputError
from endprompt_megatron.files import disk_errors

Blend = list[tuple[str, float]]


class _Identity:
    """Stands where Megatron's config wants a tokenizer, which only its cache keys use here.

    Megatron names cached indices after the path alone; the digests keep a dataset that was made anew under
    an old path from getting the old one's windows.
    """

    vocab_size = None
    pad = -1  # no id: nothing is ever padded

    def __init__(self, digests: dict[str, str]) -> None:
        self.unique_identifiers = digests


@dataclass
class EndPromptDatasetConfig(GPTDatasetConfig):
    """Megatron's config and what a sample needs; `vocab_size` is the model's, None to leave ids unchecked."""

    builder: SampleBuilder | None = None
    vocab_size: int | None = None


class EndPromptDataset(GPTDataset):
    """Two-segment samples (samples.py) of an indexed dataset; sample `index` is pure in (seed, index)."""

    def __init__(self, indexed_dataset, dataset_path, indexed_indices, num_samples, index_split, config) -> None:
        super().__init__(indexed_dataset, dataset_path, indexed_indices, num_samples, index_split, config)
        index = indexed_dataset.index
        self._stream = np.asarray(np.memmap(path_of(dataset_path, ".bin"), dtype=index.dtype, mode="r"))
        self._lengths, self._pointers = index.sequence_lengths, index.sequence_pointers  # memory-mapped: any size
        self._itemsize = np.dtype(index.dtype).itemsize
        # Scalars come out of plain arrays several times faster than out of memory maps.
        self.document_index, self.sample_index, self.shuffle_index = (
            np.asarray(array) for array in (self.document_index, self.sample_index, self.shuffle_index)
        )

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Sample `index`: see SampleBuilder.build.  Raises InputError for a token that the model does not know."""
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        context = self.context(index)
        vocab_size = self.config.vocab_size
        if vocab_size is not None and (context.max() >= vocab_size or context.min() < 0):
            bad = int(context.max() if context.max() >= vocab_size else context.min())
            raise InputError(
                f"{self.dataset_path}.bin: token id {bad} is outside the model's vocabulary of {vocab_size}; "
                "prepare the data with the model's own tokenizer"
            )
        return self.config.builder.build(context, index)

    def context(self, index: int) -> np.ndarray:
        """The window of sample `index`, [a] in the dtype of the file; read only."""
        window = int(self.shuffle_index[index])
        (first, begin), (last, end) = self.sample_index[window].tolist(), self.sample_index[window + 1].tolist()
        if first == last:
            start = int(self._pointers[self.document_index[first]]) // self._itemsize
            return self._stream[start + begin : start + end]
        documents = self.document_index[first : last + 1]
        starts = self._pointers[documents] // self._itemsize
        stops = starts + self._lengths[documents]
        stops[-1] = starts[-1] + end
        starts[0] += begin
        spans = zip(starts.tolist(), stops.tolist(), strict=True)
        return np.concatenate([self._stream[start:stop] for start, stop in spans])

    def _build_document_sample_shuffle_indices(self):
        """Megatron's cached indices, built again where a killed run left files cut short."""
        try:
            return super()._build_document_sample_shuffle_indices()
        except (EOFError, ValueError):
            distributed = torch.distributed.is_initialized()
            if distributed and torch.distributed.get_rank() != 0:
                raise  # rank 0 comes first and has mended what it could
            for file in Path(self.config.path_to_cache).glob(f"{self.unique_description_hash}-*"):
                file.unlink()
            return super()._build_document_sample_shuffle_indices()


class _Builder(BlendedMegatronDatasetBuilder):
    @staticmethod
    def build_generic_dataset(cls, is_built_on_rank, synchronize_ranks, *args):
        """Megatron's, but the index of a blend is made in memory on every rank.

        It takes milliseconds, and BlendedDataset's own cache asks for a rank where there are no ranks.
        """
        if cls is not BlendedDataset:
            return BlendedMegatronDatasetBuilder.build_generic_dataset(cls, is_built_on_rank, synchronize_ranks, *args)
        *rest, config = args
        in_memory = copy.copy(config)
        in_memory.path_to_cache = None
        with _quiet("megatron.core.datasets.blended_dataset"):
            return BlendedDataset(*rest, in_memory)


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
    chunks: int = 2,
    train_samples: int,
    valid_samples: int = 0,
    cache_dir: Path | str | None = None,
    vocab_size: int | None = None,
    tokenizer: Path | str | None = None,
) -> tuple[torch.utils.data.Dataset, torch.utils.data.Dataset | None]:
    """The training and the validation dataset (None where `valid` is None or `valid_samples` 0).

    `train` and `valid` list (PREFIX, weight); `valid` may instead split the documents of `train`, "99,1"
    giving the last hundredth to validation.  A dataset holds at least the samples asked for, over as many
    epochs as they take.  `prompts` are token ids; `vocab_size` is the model's, `tokenizer` its directory, None to
    take any dataset's ids.  Works with torch.distributed and without; with it, all ranks must call.  Raises
    InputError, on every rank alike.
    """
    builder = SampleBuilder(method, physical_len, target_len, prompts, prompt_loss_weight, seed, chunks)
    if vocab_size is not None and builder.highest_prompt_id >= vocab_size:
        raise InputError(
            f"context.prompts: token id {builder.highest_prompt_id} is outside the model's vocabulary of {vocab_size}; "
            "the tokenizer is not this model's"
        )
    if train_samples < 1:
        raise ValueError(f"train_samples={train_samples} should be at least 1")
    valid = valid or None
    if valid_samples < 1 and not isinstance(valid, str):
        valid = None
    blends = [("data.train", train)] + ([("data.valid", valid)] if isinstance(valid, list) else [])
    indices = {prefix: _check(key, prefix, weight, vocab_size) for key, blend in blends for prefix, weight in blend}
    if tokenizer is not None:
        refuse_other_tokenizer(blends, tokenizer)
    cache = Path(cache_dir) if cache_dir is not None else Path(f"{train[0][0]}-index")
    with disk_errors(cache, "data.cache"):
        cache.mkdir(parents=True, exist_ok=True)

    where = {"blend": _megatron_blend(train), "split": _checked_split(valid)}
    if not isinstance(valid, str):
        where = {"blend_per_split": [_megatron_blend(train), _megatron_blend(valid) if valid else None, None]}
    config = EndPromptDatasetConfig(
        random_seed=seed,
        sequence_length=builder.context_len,
        path_to_cache=str(cache),
        tokenizer=_Identity({prefix: index.digest for prefix, index in indices.items()}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        add_extra_token_to_sequence=False,
        builder=builder,
        vocab_size=vocab_size,
        **where,
    )
    if config.split_matrix is not None and valid_samples < 1:
        config.split_matrix[1] = None  # held out all the same, but nothing is built of it
    _check_long_enough(config, blends, indices)
    sizes = [train_samples, valid_samples, 0]
    with disk_errors(cache, "data.cache"):
        train_dataset, valid_dataset, _ = _build(sizes, config)
    return train_dataset, valid_dataset


def _build(sizes: list[int], config: EndPromptDatasetConfig) -> list:
    """Megatron's builder, with more in reserve for each dataset of a blend until the blend is satisfied."""
    for surplus in (0.005, 0.05, 0.5, 5.0):
        config.mid_level_dataset_surplus = surplus
        try:
            return _Builder(EndPromptDataset, sizes, lambda: True, config).build()
        except IndexError:
            # Rounding can ask a small dataset of a small blend for a sample or two more than its share.
            if surplus == 5.0:
                raise
    raise AssertionError("unreachable: the last surplus returns or raises")


def _megatron_blend(blend: Blend) -> tuple[list[str], list[float] | None]:
    prefixes, weights = [str(prefix) for prefix, _ in blend], [float(weight) for _, weight in blend]
    return prefixes, weights if len(blend) > 1 else None


def _checked_split(valid: str | list | None) -> str | None:
    if not isinstance(valid, str):
        return None
    shares = valid.split(",")
    if len(shares) != 2 or not all(share.strip().isdigit() and int(share) > 0 for share in shares):
        raise InputError(f"data.valid={valid}: a split has two whole numbers above 0, such as 99,1")
    return valid + ",0"


def _check(key: str, prefix: str, weight: float, vocab_size: int | None) -> Index:
    """Whether the dataset is whole, fits the model and may be weighted so."""
    if not (math.isfinite(weight) and weight > 0):
        raise InputError(f"{key}: weight {weight} of {prefix} should be above 0; leave out what should not be used")
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


def _check_long_enough(config: EndPromptDatasetConfig, blends: list, indices: dict) -> None:
    """Each dataset and each part of a split must give at least one sample; Megatron would not return otherwise."""
    for key, blend in blends:
        for prefix, _ in blend:
            lengths = indices[prefix].lengths
            parts = {"": (0.0, 1.0)}
            if config.split_matrix is not None:
                named = zip((" for training", " for validation"), config.split_matrix[:2], strict=True)
                parts = {name: bounds for name, bounds in named if bounds is not None}
            for part, (begin, end) in parts.items():
                documents = lengths[round(begin * len(lengths)) : round(end * len(lengths))]
                tokens = int(documents.sum(dtype=np.int64))
                if tokens < config.sequence_length:
                    mend = "give more text" + (", or data.valid its own" if part else "")
                    raise InputError(
                        f"{key}={prefix}: {len(documents)} documents with {tokens} tokens{part} are shorter than one "
                        f"sample, which takes {config.sequence_length}; {mend}, or lower context.physical"
                    )


@contextlib.contextmanager
def _quiet(name: str):
    """Hold back warnings of one logger (here: that an index which is not meant to be cached is not)."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
