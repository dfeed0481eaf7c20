"""The datasets: whether .idx and .bin agree, the model knows the token ids, and there are enough for the budget."""

import struct
from pathlib import Path

import numpy as np

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.units import format_count
from endprompt_megatron.config.recipe import Recipe
from endprompt_megatron.data.compatibility import refuse_other_kind, refuse_other_template, refuse_other_tokenizer
from endprompt_megatron.data.describe.document_lengths import reach, verdict
from endprompt_megatron.data.indexed import CHAT, Index, path_of, read_idx, read_manifest, read_mask
from endprompt_megatron.data.samples.blend import Source, is_split, sources_of
from endprompt_megatron.data.samples.windows import Windows
from endprompt_megatron.model.shape import ModelShape
from endprompt_megatron.preflight.model_files import context_lengths
from endprompt_megatron.preflight.table import OK, WARN, Finding

_WINDOW = 1 << 16  # tokens
_WINDOWS = 256  # in the sample; a smaller dataset is read completely
_HEADER = 34  # bytes of an .idx before its lengths


def datasets(recipe: Recipe, shape: ModelShape) -> list[Finding]:
    """A finding for data.train, and one for data.valid if it is a separate dataset."""
    if not recipe.data.train:
        raise InputError("data.train is missing; set it to the PREFIX that tools/prepare_data.py wrote")
    findings = [_dataset("data.train", sources_of(recipe.data.train, "data.train"), recipe, shape)]
    valid = recipe.data.valid
    if valid is not None and not is_split(valid):
        findings.append(_dataset("data.valid", sources_of(valid, "data.valid"), recipe, shape))
    return findings + _long_documents(recipe)


def _long_documents(recipe: Recipe) -> list[Finding]:
    """A finding for a method that needs long documents; none for the others."""
    c = recipe.context
    if not reach(c.method, c.physical, c.target):
        return []
    sources = sources_of(recipe.data.train, "data.train")
    shares = np.array([source.weight for source in sources])
    held = (read_idx(source.prefix).lengths for source in sources)
    lengths = [each[each >= recipe.data.min_document_tokens] for each in held]
    shares = (shares / shares.sum()).tolist()
    enough, words = verdict(c.method, c.physical, c.target, recipe.data.document_ends, lengths, shares)
    return [Finding("long documents", words, OK if enough else WARN)]


def _dataset(key: str, sources: list[Source], recipe: Recipe, shape: ModelShape) -> Finding:
    """Check each PREFIX of a blend, and count how often its tokens are seen."""
    samples = recipe.train.steps * recipe.train.global_batch_size if key == "data.train" else recipe.train.valid_samples
    context = max(context_lengths(recipe, shape))
    ends = "single" if recipe.context.content_skip else recipe.data.document_ends
    min_len = recipe.data.min_document_tokens
    shares = sum(source.weight for source in sources)
    sizes, epochs = [], []
    for source in sources:
        prefix = source.prefix
        index = read_idx(prefix)
        _consistent(prefix, index)
        refuse_other_kind(key, prefix, recipe.data.kind)
        if recipe.data.kind == CHAT:
            read_mask(prefix, index)
        highest = _highest_token(key, prefix, index, shape.vocab_size)
        tokens = int(index.lengths.sum(dtype=np.int64))
        windows = Windows(index, context, recipe.train.seed, ends=ends, min_len=min_len)
        count = windows.count
        if recipe.data.packing == "documents":  # roughly: prompts and padding are not counted
            count = -(-windows.tokens // recipe.context.physical) if index.lengths.max(initial=0) > 1 else 0
        if not count:
            short = (
                f" in {windows.documents} documents that are long enough"
                if windows.documents < len(index.lengths)
                else ""
            )
            raise InputError(
                f"{key}={prefix}: {windows.tokens} tokens{short} are less than one sample, which takes {context}"
            )
        epochs.append(samples * source.weight / shares / count)
        sizes.append(f"{prefix} {format_count(tokens)} tokens (ids to {highest})")
    prefixes = [(key, source.prefix) for source in sources]
    refuse_other_tokenizer(prefixes, recipe.model.hf)
    if recipe.data.kind == CHAT:
        refuse_other_template(prefixes, recipe.model.hf)
    found = f"{', '.join(sizes)}; vocabulary {shape.vocab_size}; {max(epochs):.2f} epochs in {recipe.train.steps} steps"
    if key == "data.train" and max(epochs) > 1:
        return Finding(key, f"{found}: tokens are repeated", WARN)
    return Finding(key, found, OK)


def _consistent(prefix: str, index: Index) -> None:
    """Raise InputError if the pointers and document bounds of an .idx do not follow from its lengths."""
    path = path_of(prefix, ".idx")
    count = len(index.lengths)
    documents = struct.unpack_from("<Q", _read(path, _HEADER - 8, 8))[0]
    content = np.memmap(path, mode="r")
    pointers = np.frombuffer(content, dtype=np.int64, count=count, offset=_HEADER + 4 * count)
    bounds = np.frombuffer(content, dtype=np.int64, count=documents, offset=_HEADER + 12 * count)
    ends = np.cumsum(index.lengths, dtype=np.int64)
    right = (index.lengths >= 0).all() and (pointers == (ends - index.lengths) * index.dtype.itemsize).all()
    if not right or not len(bounds) or bounds[0] != 0 or bounds[-1] != count or (np.diff(bounds) < 0).any():
        raise InputError(
            f"{path}: its pointers do not follow from its lengths; prepare it again (tools/prepare_data.py)"
        )


def _read(path: Path, offset: int, count: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(count)


def _highest_token(key: str, prefix: str, index: Index, vocab_size: int) -> int:
    """The largest id of the dataset, or of an evenly spread sample of a large one.  Raises InputError if too large."""
    path = path_of(prefix, ".bin")
    manifest = read_manifest(prefix) or {}
    highest, lowest = -1, 0
    if path.stat().st_size:
        stream = np.memmap(path, dtype=index.dtype, mode="r")
        starts = np.arange(0, len(stream), _WINDOW)
        if len(starts) > _WINDOWS:
            starts = np.linspace(0, len(stream) - _WINDOW, _WINDOWS, dtype=np.int64)
        windows = [stream[start : start + _WINDOW] for start in starts]
        highest, lowest = max(int(w.max()) for w in windows), min(int(w.min()) for w in windows)
    noted = manifest.get("max_token_id")
    highest = max(highest, noted) if isinstance(noted, int) else highest
    if lowest < 0 or highest >= vocab_size:
        bad = lowest if lowest < 0 else highest
        raise InputError(
            f"{key}={prefix}: token id {bad} is outside the model's vocabulary of {vocab_size}; prepare the data with "
            "the model's own tokenizer"
        )
    return highest
