"""One small face for the tokenizers that a LLaMA-family checkpoint can bring.

A directory in Hugging Face's form (tokenizer.json or tokenizer_config.json) goes through transformers, the
very tokenizer that inference will use; a lone SentencePiece `tokenizer.model` goes through sentencepiece.
No special token is ever added here: prepare.py and prompts.py place them knowingly.
"""

import abc
import hashlib
import json
from pathlib import Path

from endprompt_megatron.errors import InputError

_HF_FILES = ("tokenizer.json", "tokenizer_config.json")
_SENTENCEPIECE_FILE = "tokenizer.model"
# Everything that can change the ids of a text, or what an id means.
_FINGERPRINTED = (
    *_HF_FILES,
    _SENTENCEPIECE_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


class Tokenizer(abc.ABC):
    """Text to ids and back, without special tokens.

    `vocab_size` is the highest id + 1, added tokens included; `bos_id` and `eos_id` are None where absent;
    `starts_with_bos` says whether the model family puts BOS before a text.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    starts_with_bos: bool

    def encode(self, text: str) -> list[int]:
        """Ids of one text."""
        return self.encode_batch([text])[0]

    @abc.abstractmethod
    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of several texts.  Raises UnicodeEncodeError for text with lone surrogates."""

    @abc.abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens written out."""

    @abc.abstractmethod
    def convert(self, token: str) -> int | None:
        """Id of a token by its name, None if there is no such token."""


class _HuggingFace(Tokenizer):
    def __init__(self, directory: Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        self._vocabulary = self._tokenizer.get_vocab()
        self._backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if self._backend is not None:  # a tokenizer.json may carry both, and they would cut texts silently
            self._backend.no_truncation()
            self._backend.no_padding()
        self.vocab_size = max(self._vocabulary.values()) + 1
        self.bos_id = self._tokenizer.bos_token_id
        self.eos_id = self._tokenizer.eos_token_id
        self.starts_with_bos = self.bos_id is not None and self._tokenizer("a").input_ids[:1] == [self.bos_id]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        for text in texts:
            if not text.isascii():
                text.encode()  # the Rust side would raise a TypeError that names no text
        if self._backend is None:  # tokenizers that transformers writes in Python
            return [self._tokenizer.encode(text, add_special_tokens=False) for text in texts]
        # encode_batch_fast leaves out character offsets, which nobody here asks for.
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def convert(self, token: str) -> int | None:
        return self._vocabulary.get(token)


class _SentencePiece(Tokenizer):
    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self._processor = SentencePieceProcessor(model_file=str(path))
        self.vocab_size = self._processor.vocab_size()
        self.bos_id, self.eos_id = (
            None if identifier < 0 else identifier
            for identifier in (self._processor.bos_id(), self._processor.eos_id())
        )
        self.starts_with_bos = self.bos_id is not None  # LLaMA-2 and Mistral, the families that ship this file

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        for text in texts:
            text.encode()
        return [self._processor.encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def convert(self, token: str) -> int | None:
        identifier = self._processor.piece_to_id(token)
        return None if identifier == self._processor.unk_id() else identifier


def load_tokenizer(directory: Path | str) -> Tokenizer:
    """The tokenizer of a Hugging Face directory, or of a SentencePiece `tokenizer.model` (in it, or given itself).

    Raises InputError if there is none or it cannot be read.
    """
    files = _files(Path(directory))
    try:
        if any(file.name in _HF_FILES for file in files):
            return _HuggingFace(Path(directory))
        return _SentencePiece(files[0])
    except Exception as error:  # each backend has its own errors for broken files, down to bare Exception
        reason = " ".join(str(error).split())[:200]
        hint = ""
        if files[0].suffix == ".model" and len(files) == 1:
            hint = "; is it SentencePiece? LLaMA-3's own tokenizer.model is not: use the Hugging Face directory"
        raise InputError(f"{directory}: the tokenizer cannot be read ({reason}){hint}") from None


def fingerprint(directory: Path | str) -> str:
    """SHA-256 over names and contents of the tokenizer's files: equal fingerprints tokenise alike.

    Raises InputError where `load_tokenizer` would for a missing tokenizer.
    """
    digest = hashlib.sha256()
    for file in _files(Path(directory)):
        content = file.read_bytes()
        digest.update(json.dumps([file.name, len(content)]).encode())
        digest.update(content)
    return digest.hexdigest()


def _files(directory: Path) -> list[Path]:
    """The tokenizer's files, in a fixed order."""
    if directory.is_file() and directory.suffix == ".model":
        return [directory]
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory; expected a tokenizer (tokenizer.json or tokenizer.model)")
    files = [directory / name for name in _FINGERPRINTED if (directory / name).is_file()]
    if not any(file.name in (*_HF_FILES, _SENTENCEPIECE_FILE) for file in files):
        raise InputError(f"{directory}: holds no tokenizer; expected tokenizer.json or tokenizer.model")
    return files
