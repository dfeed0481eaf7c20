"""Texts to ids, a word at a time: the ids of a word are looked up, and only a word not met before is tokenised.

The tokenizers of LLaMA-3, Qwen2 and GPT-2's kind (SmolLM2) first split a text by a regular expression and then
tokenise each part by itself.  Where that expression splits whatever comes before and after, a text may be cut
before it is tokenised: the ids are the same, and almost every piece was met before.  A tokenizer is recognised by
its own description (`cut_of`), never by name; any other tokenises complete texts.
"""

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from endprompt_megatron.tokenizer import Tokenizer
from endprompt_megatron.tokenizer.tokenizer import LLAMA3_PATTERN

# White space by every definition, and characters that only some definitions include (texts with them are not cut).
_SPACE, _MORE_SPACE = "\t-\r ", "\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_DOUBTFUL = re.compile("[\x1c-\x1f\x85\u180e\u200b\u2060\ufeff]")

# Pieces; [S] is white space, [H] the same without line ends.
# GPT-2: no part goes on from something else into white space, but how white space is split hangs on what follows.
_BEFORE_SPACE = "[S]*[^S]+|[S]+"
# LLaMA-3: line ends can belong to the punctuation before them; after the last of several a part always ends.
_AFTER_LINES = "[H]*[^S]+(?:[S]*[\r\n])?|[S]*[\r\n]|[S]+"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Digits are split off before that, and then end the white space before them, as the end of a text does.
_DIGITS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{N}+| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
_QWEN2 = LLAMA3_PATTERN.replace("{1,3}", "")

# What ByteLevel makes of the bytes that are ASCII.
_AS_LETTERS = {byte: 0x100 + (byte if byte <= 32 else 33) for byte in (*range(33), 127)}

_MAX_BYTES = 96 << 20  # memory of the words of one process, about
_WORD_OVERHEAD = 200  # bytes of a word in the dictionary besides its characters and ids
_LONG_TEXT = 1 << 20  # characters; longer texts are cut and tokenised in parts of about so many


@dataclass(frozen=True)
class Cut:
    """Where texts may be cut: the backend of the tokenizers library, and regular expressions.

    `pieces` are cut off any text.  `parts` are all that the tokenizer itself makes of a piece of ASCII, unless
    `added`, the beginnings of its added tokens, are found there.
    """

    backend: Any
    pieces: str
    parts: str
    added: str


def cut_of(tokenizer: Tokenizer) -> Cut | None:
    """How the tokenizer's texts may be cut without another id coming out; None if they may not be cut."""
    backend = getattr(tokenizer, "backend", None)
    if backend is None:
        return None
    described = json.loads(backend.to_str())
    added = described["added_tokens"]
    # They are found before the text is split, and so never across a cut if there is no space in them.
    if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in added):
        return None
    if any(re.search(r"\s", token["content"]) for token in added):
        return None
    model = described["model"]
    if model["type"] != "BPE" or model.get("dropout") or model.get("continuing_subword_prefix"):
        return None
    if model.get("end_of_word_suffix") or described["normalizer"] not in (None, {"type": "NFC"}):
        return None
    if (rules := _rules_of(described["pre_tokenizer"])) is None:
        return None
    pieces, parts = rules
    begins = sorted({re.escape(token["content"][:3]) for token in added})
    return Cut(backend, pieces, parts, "|".join(begins) or "(?!)")


def _rules_of(splitter: dict | None) -> tuple[str, str] | None:
    """Pieces and parts of a known way to split."""
    steps = (splitter or {}).get("pretokenizers") or [splitter or {}]
    *before, last = steps
    if last.get("type") != "ByteLevel" or last["add_prefix_space"] or len(before) > 1:
        return None
    if last["use_regex"]:
        if not before:
            return _BEFORE_SPACE, _GPT2
        if before[0]["type"] == "Digits":
            return _BEFORE_SPACE, _DIGITS.replace("N}+", "N}") if before[0]["individual_digits"] else _DIGITS
        return None
    if not before or before[0]["type"] != "Split" or before[0]["behavior"] != "Isolated" or before[0]["invert"]:
        return None
    parts = before[0]["pattern"].get("Regex")
    return (_AFTER_LINES, parts) if parts in (LLAMA3_PATTERN, _QWEN2) else None


class Words:
    """The same bytes as encoders.WholeTexts, by a Cut; it remembers up to about 100 MB of words."""

    def __init__(self, cut: Cut, dtype: np.dtype) -> None:
        self._backend, self._dtype = cut.backend, dtype
        # Settings of the tokenizer that a copy in another process does not have.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        self._pieces_of_ascii, self._pieces_of_any = (
            re.compile(_filled(cut.pieces, more)).findall for more in ("", _MORE_SPACE)
        )
        self._parts = re.compile(_of_ascii(cut.parts), re.ASCII).findall
        self._added = re.compile(cut.added).search
        self._known: dict[str, bytes] = {}
        self._bytes = 0

    def encode(self, texts: list[str]) -> list[bytes]:
        """Ids of each text, which must be valid Unicode."""
        if any(len(text) > _LONG_TEXT for text in texts):
            return [b"".join(self._encode([part])[0] for part in self._stretches(text)) for text in texts]
        return self._encode(texts)

    def _encode(self, texts: list[str]) -> list[bytes]:
        if self._bytes > _MAX_BYTES:
            self._known.clear()
            self._bytes = 0
        cuts = [self._parts(text) if self._is_plain(text) else self._pieces(text) for text in texts]
        self._learn(set().union(*cuts).difference(self._known))
        return [b"".join(map(self._known.__getitem__, cut)) for cut in cuts]

    def _is_plain(self, text: str) -> bool:
        """Whether the tokenizer's own parts are known."""
        return text.isascii() and not _DOUBTFUL.search(text) and not self._added(text)

    def _pieces(self, text: str) -> list[str]:
        if _DOUBTFUL.search(text):
            return [text]
        return self._pieces_of_ascii(text) if text.isascii() else self._pieces_of_any(text)

    def _stretches(self, text: str) -> Iterator[str]:
        """A long text in a few stretches, each of whole pieces."""
        if _DOUBTFUL.search(text):
            yield text
            return
        begin, length = 0, _LONG_TEXT
        while begin + length < len(text):
            pieces = self._pieces(text[begin : begin + length])
            # The last one may go on, and the one before it too: with white space, up to the next line end.
            kept = length - sum(map(len, pieces[-2:]))
            if kept > 0:
                yield text[begin : begin + kept]
                begin, length = begin + kept, _LONG_TEXT
            else:
                length *= 2
        yield text[begin:]

    def _learn(self, unseen: set[str]) -> None:
        parts = {word: self._parts(word) for word in unseen if self._is_plain(word)}
        single = set().union(*parts.values()).difference(self._known)
        tokenize = self._backend.model.tokenize
        self._add(single, [[token.id for token in tokenize(part.translate(_AS_LETTERS))] for part in single])
        for word, own in parts.items():
            if len(own) > 1:
                self._remember(word, b"".join(map(self._known.__getitem__, own)))
        others = unseen.difference(parts)
        self._add(others, [e.ids for e in self._backend.encode_batch_fast(list(others), add_special_tokens=False)])

    def _add(self, words: set[str], ids: list[list[int]]) -> None:
        together = np.array(list(itertools.chain.from_iterable(ids)), dtype=self._dtype).tobytes()
        begin = 0
        for word, own in zip(words, ids, strict=True):
            end = begin + len(own) * self._dtype.itemsize
            self._remember(word, together[begin:end])
            begin = end

    def _remember(self, word: str, ids: bytes) -> None:
        self._known[word] = ids
        self._bytes += len(word) + len(ids) + _WORD_OVERHEAD


def _filled(pieces: str, more: str) -> str:
    space = _SPACE + more
    for name, characters in (("[S]", f"[{space}]"), ("[^S]", f"[^{space}]"), ("[H]", f"[\t\x0b\x0c {more}]")):
        pieces = pieces.replace(name, characters)
    return pieces


def _of_ascii(parts: str) -> str:
    """The expression as Python writes it, for texts of ASCII alone."""

    def in_class(expression: str) -> str:
        return expression.replace(r"\p{L}", "a-zA-Z").replace(r"\p{N}", "0-9")

    parts = re.sub(r"\[[^\]]*\]", lambda found: in_class(found[0]), parts)
    return parts.replace(r"\p{L}", "[a-zA-Z]").replace(r"\p{N}", "[0-9]")
