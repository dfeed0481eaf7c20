"""Conversations (`data.kind: chat`) as documents to pack: each whole or cut, and with a loss on its answers alone."""

from pathlib import Path
from typing import Any

import numpy as np

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.data.answers import KIND, answers_of
from endprompt_megatron.data.indexed import Index, read_manifest
from endprompt_megatron.data.samples.packed import Documents
from endprompt_megatron.tokenizer import load_tokenizer
from endprompt_megatron.tokenizer.chat_template import digest_of_template


class Conversations(Documents):
    """Documents of which only the answers are supervised.

    One of more than `most` tokens counts as empty (`long` "drop"), or is its first `most` tokens ("cut"), if there is
    an answer to learn among them.  `answers`: the mask of the whole dataset, uint8 [tokens].
    """

    def __init__(
        self,
        stream: np.ndarray,
        index: Index,
        first: int,
        stop: int,
        least: int,
        answers: np.ndarray,
        most: int,
        long: str,
    ) -> None:
        super().__init__(stream, index, first, stop, least)
        self._answers, self._most, self._long = answers, most, long
        self._too_long = np.flatnonzero(self.lengths > most)
        self.lengths = np.where(self.lengths > most, 0 if long == "drop" else most, self.lengths)
        if long == "cut":
            for document in self._too_long.tolist():
                begin = self.begin(document)
                if not answers[begin + 1 : begin + most].any():
                    self.lengths[document] = 0

    def weigh(self, row: dict[str, np.ndarray], begin: int) -> None:
        size = len(row["tokens"])
        # The target at i is token i + 1.
        row["loss_weights"][:-1] = self._answers[begin + 1 : begin + size]

    def describe(self) -> dict:
        return {**super().describe(), "long": self._long}

    def said(self) -> str:
        count = len(self._too_long)
        if not count:
            return ""
        cut = int(np.count_nonzero(self.lengths[self._too_long]))
        parts = [f"{cut:,} cut"] * bool(cut) + [f"{count - cut:,} left out"] * (count > cut)
        return f"; of {count:,} conversations longer than {self._most:,} tokens {', '.join(parts)}"


def refuse_other_kind(key: str, prefix: Path | str, kind: str, index: Index) -> np.ndarray | None:
    """The mask of a dataset of conversations, None of texts.  Raises InputError if it is of another `kind`."""
    found = (read_manifest(prefix) or {}).get("kind", "text")
    if found != kind:
        held = {"text": "texts", KIND: "conversations"}.get(found, found)
        remedy = f"set data.kind={found}" if kind == "text" else "prepare it with tools/prepare_data.py --chat"
        raise InputError(f"{key}={prefix} holds {held}, not what data.kind={kind} says; {remedy}")
    return answers_of(prefix, index) if kind == KIND else None


def refuse_other_template(blends: list[tuple[str, list[tuple]]], model: Path | str) -> None:
    """Raise InputError for a PREFIX of `blends` (key, [(PREFIX, ...)]) that another chat template than `model`'s wrote.

    The exported model has the template of `model`, the Hugging Face directory, and is asked by it.
    """
    own: Any = getattr(load_tokenizer(model), "own_template", None)
    for key, blend in blends:
        for prefix, *_ in blend:
            manifest = read_manifest(prefix) or {}
            if manifest.get("kind") != KIND:  # refuse_other_kind has a word for it
                continue
            if own is not None and manifest.get("chat_template_sha256") == digest_of_template(own):
                continue
            raise InputError(
                f"{key}={prefix}: model.hf={model} has {'no' if own is None else 'another'} chat template, and so "
                "would the exported model: put the one that the conversations were written with there, as "
                "chat_template.jinja, or prepare them again"
            )
