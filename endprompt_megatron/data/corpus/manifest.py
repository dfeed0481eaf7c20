"""PREFIX.json: what a dataset was made of, and how.  The same for any number of workers."""

from pathlib import Path

import numpy as np

from endprompt_megatron.data.corpus.chunks import Piece
from endprompt_megatron.data.corpus.filters import histogram
from endprompt_megatron.data.corpus.inputs import Source
from endprompt_megatron.data.corpus.join import Joined
from endprompt_megatron.data.corpus.readers import place
from endprompt_megatron.data.corpus.rejects import FIRST
from endprompt_megatron.data.corpus.tokenise import TRAIN, VALID, Job, Part


def manifests(
    job: Job, pieces: list[Piece], parts: list[Part], joined: dict[str, Joined], about: dict, sums: dict[str, str]
) -> dict[str, dict]:
    """The manifest of each output.  `about` is what the tokenizer and the options add, `sums` has SHA-256 by path."""
    left_out = {key: sum(part.left_out[key] for part in parts) for key in ("empty", "too_short", "too_long")}
    skipped = _skipped(pieces, parts)
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
            "sources": _sources(pieces, parts, dataset, sums),
        }
    if VALID in found:
        held_out = {key: found[VALID][key] for key in ("documents", "tokens")}
        for output, manifest in found.items():
            manifest |= {"split": "train" if output == TRAIN else "valid", "held_out": held_out}
    return found


def _skipped(pieces: list[Piece], parts: list[Part]) -> dict[str, dict]:
    """By kind: how many, and the first few with their places."""
    kinds: dict[str, dict] = {}
    for piece, part in zip(pieces, parts, strict=True):
        for kind, (count, first) in part.bad.items():
            known = kinds.setdefault(kind, {"count": 0, "first": []})
            known["count"] += count
            room = FIRST - len(known["first"])
            known["first"] += [f"{place(piece, number)}: {message}" for number, message in first[:room]]
    return dict(sorted(kinds.items()))


def _sources(pieces: list[Piece], parts: list[Part], dataset: Joined, sums: dict[str, str]) -> list[dict]:
    found: dict[Source, dict] = {}
    for number, (piece, part) in enumerate(zip(pieces, parts, strict=True)):
        source = piece.source
        if source not in found:
            found[source] = {"path": source.path, "bytes": source.bytes, "sha256": sums[source.path]}
            found[source] |= {"documents": 0, "tokens": 0, "skipped": 0}
        mine = dataset.lengths[dataset.bounds[number] : dataset.bounds[number + 1]]
        found[source]["documents"] += len(mine)
        found[source]["tokens"] += int(mine.sum(dtype=np.int64))
        found[source]["skipped"] += sum(count for count, _ in part.bad.values())
    return list(found.values())


def summary(out: Path | str, manifest: dict) -> str:
    """The closing line of a run: what is there, and what is not in it."""
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
        line += f"; skipped as bad: {', '.join(kinds)} (first: {first})"
    return line
