"""Texts to ids, a word at a time: what a word becomes is looked up, and only a word not met before is tokenised.

The tokenizers of LLaMA-3, Qwen2 and GPT-2's kind (SmolLM2) first split a text by a regular expression and then
tokenise each part by itself.  Where that expression splits whatever comes before and after, a text may be cut
before it is tokenised: the ids are the same, and almost every piece is one that was met before.  A tokenizer is
taken for one of that kind by its own description (`cut_of`), never by name; any other tokenises whole texts.
"""

import itertools
import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from endprompt_megatron.tokenizer import Tokenizer

# White space by every definition, and what some call so and others do not (texts with it are not cut).
_SPACE, _MORE_SPACE = "\t-\r ", "\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_DOUBTFUL = re.compile("[\x1c-\x1f\x85\u180e\u200b\u2060\ufeff]")

# Pieces; [S] is white space, [H] the same without line ends.
# GPT-2: no part goes on from something else into white space, but how white space is split hangs on what follows.
_BEFORE_SPACE = "[S]*[^S]+|[S]+"
# LLaMA-3: line ends can belong to the punctuation before them; after the last of several a part always ends.
_AFTER_LINES = "[H]*[^S]+(?:[S]*[\r\n])?|[S]*[\r\n]|[S]+"

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_CUTS = {_LLAMA3: _AFTER_LINES, _QWEN2: _AFTER_LINES}

# A piece not met before is cut further: letters end where something else begins, and one line end before a letter
# stands alone.  Then most are plain words, which are one part each.
_FURTHER = re.compile(r"(?<=[A-Za-z])(?=[^A-Za-z\u0080-\U0010ffff])|(?<=\A\n)(?=[A-Za-z])").split
_PLAIN_WORD = re.compile(" ?[A-Za-z]+").fullmatch
_SPACE_AS_LETTER = "\u0120"  # what ByteLevel makes of a space; ASCII letters stay as they are

_MOST_BYTES = 96 << 20  # what the words of one process may take, about
_WORD_OVERHEAD = 200  # bytes of a word in the dictionary besides its characters and ids
_LONG_TEXT = 1 << 20  # characters; longer texts are cut and tokenised in parts of about so many


@dataclass(frozen=True)
class Cut:
    """Where texts may be cut: the backend of the tokenizers library, and the pieces as a regular expression.

    A piece with one of the characters `whole` is not cut further: an added token may begin there.
    """

    backend: Any
    pieces: str
    whole: str


def cut_of(tokenizer: Tokenizer) -> Cut | None:
    """How the tokenizer's texts may be cut without another id coming out; None for not at all."""
    backend = getattr(tokenizer, "_backend", None)
    if backend is None:
        return None
    described = json.loads(backend.to_str())
    for token in described["added_tokens"]:
        # Found before the text is split, and so never across a cut if there is no space in them.
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            return None
        if re.search(r"\s", token["content"]) or not re.search(r"[^A-Za-z]", token["content"]):
            return None
    model = described["model"]
    if model["type"] != "BPE" or model.get("dropout") or model.get("continuing_subword_prefix"):
        return None
    if model.get("end_of_word_suffix") or described["normalizer"] not in (None, {"type": "NFC"}):
        return None
    pieces = _pieces_of(described["pre_tokenizer"])
    if pieces is None:
        return None
    begins = sorted({token["content"][0] for token in described["added_tokens"]})
    # NFC makes plain letters of some others (the sign for Kelvin), and so could make an added token.
    whole = "".join(map(re.escape, begins)) + ("\x80-\U0010ffff" if described["normalizer"] else "")
    return Cut(backend, pieces, f"[{whole}]" if whole else "(?!)")


def _pieces_of(splitter: dict | None) -> str | None:
    steps = (splitter or {}).get("pretokenizers") or [splitter or {}]
    *before, last = steps
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return None
    if last["use_regex"]:
        # SmolLM2: digits are split off first; they are no white space, and so in the middle of a piece.
        return _BEFORE_SPACE if all(step["type"] == "Digits" for step in before) else None
    if len(before) != 1 or before[0]["type"] != "Split":
        return None
    [split] = before
    if split["behavior"] != "Isolated" or split["invert"]:
        return None
    return _CUTS.get(split["pattern"].get("Regex"))


class WholeTexts:
    """Ids of texts by a tokenizer, as bytes of `dtype`."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype) -> None:
        self._tokenizer, self._dtype = tokenizer, dtype

    def encode(self, texts: list[str]) -> list[bytes]:
        """Ids of each text, which must be valid Unicode."""
        return [np.array(ids, dtype=self._dtype).tobytes() for ids in self._tokenizer.encode_batch(texts)]


class Words:
    """The same bytes as WholeTexts, by a Cut; it remembers up to about 100 MB of words."""

    def __init__(self, cut: Cut, dtype: np.dtype) -> None:
        self._backend, self._model, self._dtype = cut.backend, cut.backend.model, dtype
        self._backend.no_truncation()
        self._backend.no_padding()
        # Most texts are plain ASCII, and the shorter list of spaces is quicker to go through.
        self._ascii, self._any = (re.compile(_filled(cut.pieces, more)).findall for more in ("", _MORE_SPACE))
        self._whole = re.compile(cut.whole).search
        self._known: dict[str, bytes] = {}
        self._bytes = 0

    def encode(self, texts: list[str]) -> list[bytes]:
        """Ids of each text, which must be valid Unicode."""
        if any(len(text) > _LONG_TEXT for text in texts):
            return [b"".join(self._encode([part])[0] for part in self._parts(text)) for text in texts]
        return self._encode(texts)

    def _encode(self, texts: list[str]) -> list[bytes]:
        if self._bytes > _MOST_BYTES:
            self._known.clear()
            self._bytes = 0
        cuts = [self._pieces(text) for text in texts]
        self._learn(set().union(*cuts).difference(self._known))
        return [b"".join(map(self._known.__getitem__, cut)) for cut in cuts]

    def _pieces(self, text: str) -> list[str]:
        if _DOUBTFUL.search(text):
            return [text]
        return self._ascii(text) if text.isascii() else self._any(text)

    def _parts(self, text: str):
        """A long text in a few parts, each of whole pieces."""
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
        finer = {word: parts for word in unseen if len(parts := _FURTHER(word)) > 1 and not self._whole(word)}
        single = unseen.difference(finer).union(*finer.values()).difference(self._known)
        plain = list(filter(_PLAIN_WORD, single))
        others = list(single.difference(plain))
        tokenize = self._model.tokenize
        self._add(plain, [[token.id for token in tokenize(word.replace(" ", _SPACE_AS_LETTER))] for word in plain])
        self._add(others, [e.ids for e in self._backend.encode_batch_fast(others, add_special_tokens=False)])
        for word, parts in finer.items():
            self._known[word] = b"".join(map(self._known.__getitem__, parts))
            self._bytes += len(word) + len(self._known[word]) + _WORD_OVERHEAD

    def _add(self, words: list[str], ids: list[list[int]]) -> None:
        together = np.array(list(itertools.chain.from_iterable(ids)), dtype=self._dtype).tobytes()
        begin = 0
        for word, own in zip(words, ids, strict=True):
            end = begin + len(own) * self._dtype.itemsize
            self._known[word] = together[begin:end]
            begin = end
        self._bytes += len(together) + sum(map(len, words)) + _WORD_OVERHEAD * len(words)


def _filled(pieces: str, more: str) -> str:
    space = _SPACE + more
    for name, characters in (("[S]", f"[{space}]"), ("[^S]", f"[^{space}]"), ("[H]", f"[\t\x0b\x0c {more}]")):
        pieces = pieces.replace(name, characters)
    return pieces
