"""SentencePiece's `tokenizer.model`, as LLaMA-2 and Mistral ship it, by sentencepiece itself."""

import hashlib
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from endprompt_megatron.tokenizer.tokenizer import Tokenizer, refuse_surrogates


class SentencePiece(Tokenizer):
    """Control symbols such as `</s>` are never found in a text: sentencepiece knows them by id alone."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._processor = SentencePieceProcessor(model_file=str(path))
        self.vocab_size = self._processor.vocab_size()
        self.bos_id, self.eos_id = (
            None if identifier < 0 else identifier
            for identifier in (self._processor.bos_id(), self._processor.eos_id())
        )
        self.starts_with_bos = self.bos_id is not None

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        refuse_surrogates(texts)
        # One by one: a list would start a thread for each CPU.
        return [self._processor.encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def convert(self, token: str) -> int | None:
        identifier = self._processor.piece_to_id(token)
        return None if identifier == self._processor.unk_id() else identifier

    def rules(self) -> object:
        return {"sentencepiece": hashlib.sha256(self._path.read_bytes()).hexdigest()}
