"""PREFIX.json: what a dataset was made of, and how.  The same for any number of workers."""

from pathlib import Path

import numpy as np

from endprompt_megatron.data.corpus.chunks import Chunk
from endprompt_megatron.data.corpus.filters import histogram
from endprompt_megatron.data.corpus.finish import Joined
from endprompt_megatron.data.corpus.inputs import Source
from endprompt_megatron.data.corpus.readers import place
from endprompt_megatron.data.corpus.rejects import MAX_PLACES
from endprompt_megatron.data.corpus.tokenise import TRAIN, VALID, Job, Tokenised


def manifests(
    job: Job,
    chunks: list[Chunk],
    tokenised: list[Tokenised],
    joined: dict[str, Joined],
    about: dict,
    checksums: dict[str, str],
) -> dict[str, dict]:
    """The manifest of each output.

    `about` is what the tokenizer and the options add, `checksums` are SHA-256 by the sources' paths.
    """
    left_out = {key: sum(each.left_out[key] for each in tokenised) for key in ("empty", "too_short", "too_long")}
    skipped = _skipped(chunks, tokenised)
    found = {}
    for output, dataset in joined.items():
        found[output] = {
            "format": 1,
            "documents": len(dataset.lengths),
            "tokens": int(dataset.lengths.sum(dtype=np.int64)),
            "empty_documents": left_out["empty"],
            "dtype": job.dtype.name,
            "max_token_id": dataset.max_id,
            "bos": job.bos,
            "eos": job.eos,
            **about,
            "left_out": {**left_out, "duplicates": sum(other.duplicates for other in joined.values())},
            "skipped": skipped,
            **({} if dataset.answers is None else {"answer_tokens": dataset.answers}),
            "lengths": histogram(dataset.lengths),
            "crc32": dataset.checksums,
            "sources": _sources(chunks, tokenised, dataset, checksums),
        }
    if VALID in found:
        held_out = {key: found[VALID][key] for key in ("documents", "tokens")}
        for output, manifest in found.items():
            manifest |= {"split": "train" if output == TRAIN else "valid", "held_out": held_out}
    return found


def _skipped(chunks: list[Chunk], tokenised: list[Tokenised]) -> dict[str, dict]:
    """By kind: how many, and the first few with their places."""
    kinds: dict[str, dict] = {}
    for chunk, each in zip(chunks, tokenised, strict=True):
        for kind, (count, first) in each.bad.items():
            known = kinds.setdefault(kind, {"count": 0, "first": []})
            known["count"] += count
            free = MAX_PLACES - len(known["first"])
            known["first"] += [f"{place(chunk, number)}: {message}" for number, message in first[:free]]
    return dict(sorted(kinds.items()))


def _sources(chunks: list[Chunk], tokenised: list[Tokenised], dataset: Joined, checksums: dict[str, str]) -> list[dict]:
    found: dict[Source, dict] = {}
    for number, (chunk, each) in enumerate(zip(chunks, tokenised, strict=True)):
        source = chunk.source
        if source not in found:
            found[source] = {"path": source.path, "bytes": source.bytes, "sha256": checksums[source.path]}
            found[source] |= {"documents": 0, "tokens": 0, "skipped": 0}
        mine = dataset.lengths[dataset.bounds[number] : dataset.bounds[number + 1]]
        found[source]["documents"] += len(mine)
        found[source]["tokens"] += int(mine.sum(dtype=np.int64))
        found[source]["skipped"] += sum(count for count, _ in each.bad.values())
    return list(found.values())


def summary(out: Path | str, manifest: dict) -> str:
    """The closing line of a run: what the dataset holds, and what was left out."""
    what = "conversations" if "answer_tokens" in manifest else "documents"
    line = f"{out}: {manifest['documents']} {what}, {manifest['tokens']} tokens"
    if "answer_tokens" in manifest:
        line += f", {manifest['answer_tokens']} of them in answers"
    if held_out := manifest.get("held_out"):
        line += f"; {out}{VALID}: {held_out['documents']} {what}, {held_out['tokens']} tokens"
    left_out = manifest["left_out"]
    names = {"empty": "empty texts", "too_short": "too short", "too_long": "too long", "duplicates": "duplicates"}
    if reasons := [f"{left_out[key]} {name}" for key, name in names.items() if left_out[key]]:
        line += f"; {', '.join(reasons)} left out"
    if manifest["skipped"]:
        kinds = [f"{kind['count']} {name}" for name, kind in manifest["skipped"].items()]
        first = next(iter(manifest["skipped"].values()))["first"][0]
        line += f"; rejected and skipped: {', '.join(kinds)} (first: {first})"
    if not_read := manifest.get("not_read"):
        more = f" and {len(not_read) - MAX_PLACES} more" if len(not_read) > MAX_PLACES else ""
        line += f"; files left out, of a kind that is not read: {', '.join(not_read[:MAX_PLACES])}{more}"
    return line
