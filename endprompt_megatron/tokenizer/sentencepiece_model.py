"""SentencePiece's `tokenizer.model`, as LLaMA-2 and Mistral ship it, by sentencepiece itself.

In a Hugging Face directory the files beside it say how documents begin and end, and add tokens (special_tokens.py).
"""

import hashlib
import re
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from endprompt_megatron.tokenizer.special_tokens import added_tokens, ends_beside
from endprompt_megatron.tokenizer.tokenizer import Tokenizer, refuse_surrogates


class SentencePiece(Tokenizer):
    """Control symbols such as `</s>` are never found in a text: sentencepiece knows them by id alone."""

    def __init__(self, path: Path, directory: Path | None = None) -> None:
        """`directory`: where files beside `path` are looked for; None for a tokenizer.model by itself."""
        self._path = path
        self._processor = SentencePieceProcessor(model_file=str(path))
        size = self._processor.vocab_size()
        added = [token for token in (added_tokens(directory) if directory else []) if token.id >= size]
        self._added = {token.content: token.id for token in added}
        self._in_texts = _splitter([token.content for token in added if not token.special])
        self._in_prompts = _splitter(list(self._added))
        self.vocab_size = max([size, *(token.id + 1 for token in added)])
        bos, eos = (
            None if identifier < 0 else identifier
            for identifier in (self._processor.bos_id(), self._processor.eos_id())
        )
        if directory is None:
            self.bos_id, self.eos_id, self.starts_with_bos = bos, eos, bos is not None
        else:
            ends = ends_beside(directory, self.convert, bos, eos)
            self.bos_id, self.eos_id, self.starts_with_bos = ends.bos_id, ends.eos_id, ends.starts_with_bos

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        refuse_surrogates(texts)
        # One by one: a list would start a thread for each CPU.
        if self._in_texts is None:
            return [self._processor.encode(text) for text in texts]
        return [self._split(text, self._in_texts) for text in texts]

    def encode_prompt(self, text: str) -> list[int]:
        refuse_surrogates([text])
        return self._processor.encode(text) if self._in_prompts is None else self._split(text, self._in_prompts)

    def _split(self, text: str, pattern: re.Pattern) -> list[int]:
        ids: list[int] = []
        for part in filter(None, pattern.split(text)):
            ids += [self._added[part]] if part in self._added else self._processor.encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        if not self._added:
            return self._processor.decode(ids)
        names = {identifier: content for content, identifier in self._added.items()}
        parts, run = [], []
        for identifier in ids:
            if identifier in names:
                parts += [self._processor.decode(run), names[identifier]]
                run = []
            else:
                run.append(identifier)
        return "".join([*parts, self._processor.decode(run)])

    def convert(self, token: str) -> int | None:
        if token in self._added:
            return self._added[token]
        identifier = self._processor.piece_to_id(token)
        return None if identifier == self._processor.unk_id() else identifier

    def rules(self) -> object:
        rules = {"sentencepiece": hashlib.sha256(self._path.read_bytes()).hexdigest()}
        if self._in_texts is not None:
            rules["added"] = sorted(content for content in self._added if self._in_texts.fullmatch(content))
        return rules


def _splitter(tokens: list[str]) -> re.Pattern | None:
    """A pattern that splits a text at these tokens and keeps them, the longest first; None without any."""
    if not tokens:
        return None
    return re.compile("(" + "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) + ")")
