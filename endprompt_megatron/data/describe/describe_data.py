"""What a run will train on, to look at before it costs anything: samples as text, and statistics of the sources.

`look` gathers everything as plain values (--json prints them), `page` writes them for people; picture.py draws rows.
"""

from dataclasses import asdict
from typing import Any

import numpy as np

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.config.recipe import Context, Data
from endprompt_megatron.data.describe.document_lengths import at_least, lengths_of, percent, verdict
from endprompt_megatron.data.describe.segments import segments, weight_runs
from endprompt_megatron.data.indexed import CHAT, Index, path_of, read_idx, read_manifest, read_mask
from endprompt_megatron.data.samples.dataset import Dataset, Source, consumed, sources_in
from endprompt_megatron.tokenizer import Tokenizer

_SHOWN = 24  # tokens at either end of a segment


def look(
    context: Context, data: Data, dataset: Dataset, tokenizer: Tokenizer, start: int, count: int
) -> dict[str, Any]:
    """{"samples": [...], "sources": [...], "verdict", "long_enough"} of a training dataset.

    `context` and `data` are the sections of the recipe that it was built of.  Raises InputError for samples that the
    run does not take.
    """
    if not 0 <= start < len(dataset):
        raise InputError(f"--start {start}: the run takes samples 0 to {len(dataset) - 1}")
    c = context
    taken = consumed(dataset, len(dataset))["sources"]
    sources, lengths = [], []
    for source, counts in zip(sources_in(dataset), taken, strict=True):
        of_all = read_idx(source.prefix).lengths
        lengths.append(of_all[of_all >= data.min_document_tokens])
        marks = {"context.physical": c.physical, "context.target": c.target}
        answers = (read_manifest(source.prefix) or {}).get("answer_tokens")
        sources.append({**counts, **of_documents(of_all, marks), "answer_tokens": answers})
    enough, words = verdict(
        c.method, c.physical, c.target, data.document_ends, lengths, [counts["share"] for counts in taken]
    )
    samples = [describe(dataset, index, tokenizer) for index in range(start, min(start + count, len(dataset)))]
    return {"samples": samples, "sources": sources, "long_enough": enough, "verdict": words}


def of_documents(lengths: np.ndarray, marks: dict[str, int]) -> dict[str, Any]:
    """{"lengths": statistics.Lengths as a dict, "at_least": {name: {tokens, documents, share}}} for each mark."""
    reached = {name: (tokens, *at_least(lengths, tokens)) for name, tokens in marks.items()}
    keys = ("tokens", "documents", "share")
    return {
        "lengths": lengths_of(lengths).as_dict(),
        "at_least": {name: dict(zip(keys, values, strict=True)) for name, values in reached.items()},
    }


def describe(dataset: Dataset, index: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """One sample of the run: its source, the documents that it takes from, its segments, its loss weights.

    "recalled": where in its context the spans of its recall prompts begin.
    """
    source, number = dataset.locate(index)
    sample = source[number]
    tokens = sample["tokens"].tolist()
    return {
        "sample": index,
        "source": source.prefix,
        "number": number,
        "epoch": source.epoch(number) + 1,
        "documents": documents_in(source, number),
        "segments": [
            {**asdict(segment), "text": _ends(tokenizer, tokens[segment.start : segment.stop])}
            for segment in segments(sample)
        ],
        "recalled": source.recalled(number),
        "loss_weights": weight_runs(sample),
    }


def documents_in(source: Source, number: int) -> list[dict[str, int]]:
    """The excerpts of documents that the context of a sample, or of a row of samples, consists of.

    start, stop: where in the row; document: its number in the dataset; first, last: of its tokens; length: all of them.
    """
    return [
        {
            "start": each.at,
            "stop": each.at + each.tokens,
            "document": each.document,
            "first": each.first,
            "last": each.first + each.tokens - 1,
            "length": each.document_len,
        }
        for each in source.excerpts(number)
    ]


def look_at_documents(prefix: str, tokenizer: Tokenizer, start: int, count: int) -> dict[str, Any]:
    """{"documents": [...], "lengths": ...} of a dataset by itself.  Raises InputError."""
    index = read_idx(prefix)
    if not 0 <= start < len(index.lengths):
        raise InputError(f"--start {start}: {prefix} has documents 0 to {len(index.lengths) - 1}")
    numbers = range(start, min(start + count, len(index.lengths)))
    chat = (read_manifest(prefix) or {}).get("kind") == CHAT
    answers = read_mask(prefix, index) if chat else None
    documents = []
    for n in numbers:
        begin, size = int(index.pointers[n]) // index.dtype.itemsize, int(index.lengths[n])
        documents.append({"document": n, "tokens": size, "text": _text(prefix, index, n, tokenizer)})
        if answers is not None:
            documents[-1]["answer_tokens"] = int(answers[begin : begin + size].sum())
    return {"documents": documents, **of_documents(index.lengths, {})}


def _text(prefix: str, index: Index, number: int, tokenizer: Tokenizer) -> str:
    stream = np.memmap(path_of(prefix, ".bin"), dtype=index.dtype, mode="r")
    begin = int(index.pointers[number]) // index.dtype.itemsize
    return _ends(tokenizer, stream[begin : begin + int(index.lengths[number])].tolist())


def _ends(tokenizer: Tokenizer, tokens: list[int]) -> str:
    """The text of the first and the last tokens, on one line."""
    if len(tokens) <= 2 * _SHOWN:
        text = tokenizer.decode(tokens)
    else:
        text = f"{tokenizer.decode(tokens[:_SHOWN])} ... {tokenizer.decode(tokens[-_SHOWN:])}"
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


# For people


def page(looked: dict[str, Any], document_ends: str) -> str:
    """What `look` found, for a person.  `document_ends` is the recipe's."""
    parts = [sample_in_words(sample) for sample in looked["samples"]]
    parts += [source_in_words(source, document_ends) for source in looked["sources"]]
    return "\n\n".join([*parts, looked["verdict"]])


def documents_page(looked: dict[str, Any], prefix: str) -> str:
    """What `look_at_documents` found, for a person."""
    parts = []
    for each in looked["documents"]:
        answers = f", {each['answer_tokens']:,} of them in answers" if "answer_tokens" in each else ""
        parts.append(f"document {each['document']:,}, {each['tokens']:,} tokens{answers}\n  {each['text']}")
    return "\n\n".join([*parts, f"{prefix}\n{histogram(looked['lengths'])}"])


def sample_in_words(sample: dict[str, Any]) -> str:
    """A paragraph on one sample."""
    documents = sample["documents"]
    count = len({excerpt["document"] for excerpt in documents})
    lines = [
        f"sample {sample['sample']:,}: number {sample['number']:,} of {sample['source']}, epoch {sample['epoch']}",
        f"  from {count} document{'s' * (count > 1)}: {_excerpts(documents)}",
    ]
    several = len({segment["sample"] for segment in sample["segments"]} - {-1}) > 1
    for segment in sample["segments"]:
        which = f" {segment['sample']}" if several and segment["sample"] >= 0 else ""
        positions = ", ".join(_range(first, last) for first, last in segment["positions"])
        count = segment["stop"] - segment["start"]
        where = _range(segment["start"], segment["stop"] - 1)
        tokens = f"{count:,} token{'s' * (count > 1)}"
        lines.append(f"  {segment['kind']}{which}: {tokens} at {where}, position ids {positions}")
        lines.append(f"    {segment['text']}")
    if sample["recalled"]:
        places = ", ".join(f"{place:,}" for place in sample["recalled"])
        lines.append(f"  recalled: what stands in the context from {places} on")
    runs = [f"{weight:g} for {_range(start, stop - 1)}" for start, stop, weight in sample["loss_weights"]]
    return "\n".join([*lines, f"  loss weight of the next token: {', '.join(runs)}"])


def _excerpts(documents: list[dict[str, int]], shown: int = 6) -> str:
    """Documents of a sample with the tokens that it takes of each, and where in the row one ends."""
    listed = []
    for each in documents[:shown]:
        first, last, length = each["first"], each["last"], each["length"]
        tokens = "all" if last - first + 1 == length else f"tokens {_range(first, last)}"
        listed.append(f"#{each['document']} ({tokens} of {length:,}) at {_range(each['start'], each['stop'] - 1)}")
    return ", ".join(listed) + (f" and {len(documents) - shown} more" if len(documents) > shown else "")


def _range(first: int, last: int) -> str:
    return f"{first:,}" if first == last else f"{first:,}..{last:,}"


def source_in_words(source: dict[str, Any], document_ends: str) -> str:
    """What the run takes of a source, and how long its documents are."""
    unit, how = "samples", f"data.document_ends={document_ends}"
    if "packed_documents" in source:
        unit, how = "rows", "data.packing=documents"
    lines = [
        f"{source['prefix']}",
        f"  the run takes {source['samples']:,} {unit} of it ({percent(source['share'])}): "
        f"{source['context_tokens']:,} context tokens, {source['prompt_tokens']:,} prompt tokens, "
        f"{source['epochs']:.2f} epochs",
        f"  an epoch is {source['epoch_samples']:,} {unit} of {source['epoch_documents']:,} documents ({how}); "
        f"{source['left_out_tokens']:,} tokens are left out",
    ]
    if source["answer_tokens"] is not None:
        share = percent(source["answer_tokens"] / max(source["lengths"]["tokens"], 1))
        lines.append(f"  conversations: {share} of the tokens are answers, which alone have a loss")
    for name, reached in source["at_least"].items():
        count, share = reached["documents"], percent(reached["share"])
        lines.append(f"  of at least {reached['tokens']:,} tokens ({name}): {count:,} documents, {share} of the tokens")
    return "\n".join([*lines, histogram(source["lengths"])])


def histogram(lengths: dict[str, Any]) -> str:
    """A table of document lengths with a bar for the share of the tokens."""
    documents, tokens = lengths["documents"], lengths["tokens"]
    lines = [
        f"  {documents:,} documents, {tokens:,} tokens; a document has {lengths['median']:,} (median), "
        f"{lengths['mean']:,.0f} (mean), at most {lengths['longest']:,}",
        f"  {'tokens of a document':>22} {'documents':>12} {'share of the tokens':>21}",
    ]
    first = next((n for n, each in enumerate(lengths["bins"]) if each["documents"]), 0)
    for each in lengths["bins"][first:]:
        share = each["tokens"] / tokens if tokens else 0.0
        name = f"{each['least']:,} to {each['below'] - 1:,}"
        lines.append(f"  {name:>22} {each['documents']:>12,} {share:>8.1%} {'#' * round(40 * share)}".rstrip())
    return "\n".join(lines)
