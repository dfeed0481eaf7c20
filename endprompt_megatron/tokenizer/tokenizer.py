"""What every tokenizer does here: text to ids and back, without special tokens; and which kind a directory holds.

No tokenizer library is needed to tell the kind.
"""

import abc
import re
from pathlib import Path
from typing import Any

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.files import refuse_pointer
from endprompt_megatron.tokenizer.chat_template import ChatTemplate

HUGGING_FACE, SENTENCE_PIECE, TIKTOKEN = "Hugging Face", "SentencePiece", "tiktoken"
TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_MODEL = "tokenizer.model"
TOKENIZER_CONFIG = "tokenizer_config.json"

# How LLaMA-3 splits a text into words, which its tiktoken file does not contain.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The special tokens that LLaMA-3 has after its ranks: the file does not list them.
LLAMA3_RANKS, LLAMA3_SPECIAL = 128_000, 256

_RANK = re.compile(rb"\s*[A-Za-z0-9+/]+={0,2} \d+\s")


def find(path: Path) -> tuple[str, Path]:
    """The kind of the tokenizer at `path`, and the directory (Hugging Face) or file (the others) to read.

    Raises InputError if there is none.
    """
    for file in (path, path / TOKENIZER_JSON, path / TOKENIZER_MODEL):
        if file.is_file():
            refuse_pointer(file)
    if path.is_file():
        return kind_of_model(path), path
    if not path.is_dir():
        raise InputError(f"{path}: no such directory; expected a tokenizer (tokenizer.json or tokenizer.model)")
    if (path / TOKENIZER_JSON).is_file():
        return HUGGING_FACE, path
    if (path / TOKENIZER_MODEL).is_file():
        return kind_of_model(path / TOKENIZER_MODEL), path / TOKENIZER_MODEL
    if (path / TOKENIZER_CONFIG).is_file():
        return HUGGING_FACE, path
    raise InputError(f"{path}: holds no tokenizer; expected tokenizer.json or tokenizer.model")


def kind_of_model(path: Path) -> str:
    """A tiktoken file is lines of base64 and rank; a SentencePiece model is binary."""
    with open(path, "rb") as file:
        head = file.read(4096)
    return TIKTOKEN if _RANK.match(head) else SENTENCE_PIECE


class Tokenizer(abc.ABC):
    """Text to ids and back.

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
        """Ids of several texts, by one thread.  Raises UnicodeEncodeError for text with lone surrogates.

        The names of special tokens are text like any other: "<|end_of_text|>" in a corpus ends no document.
        """

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text in which the names of special tokens stand for these tokens, as its author means them."""
        return self.encode(text)

    def chat_template(self, where: str, file: str | None = None) -> ChatTemplate:
        """The template of conversations: that of `file`, or the tokenizer's own.

        Raises InputError, naming the tokenizer's directory `where`, if there is none or it cannot be used.
        """
        raise InputError(
            f"{where}: conversations need a Hugging Face tokenizer with a tokenizer.json; save it once with "
            "transformers' save_pretrained"
        )

    def for_chat(self) -> Any:
        """A tokenizers.Tokenizer that finds special tokens in texts and gives the offsets of what it found."""
        raise TypeError("chat_template says which tokenizers have one")

    @abc.abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens written out."""

    @abc.abstractmethod
    def convert(self, token: str) -> int | None:
        """Id of a token by its name, None if there is no such token."""

    @abc.abstractmethod
    def rules(self) -> object:
        """Everything that decides which ids a text gives, as JSON can say it; what does not is left out."""


def refuse_surrogates(texts: list[str]) -> None:
    """Raise UnicodeEncodeError, whose `object` is the text, for half characters, which JSON can hold."""
    for text in texts:
        if not text.isascii():
            text.encode()
