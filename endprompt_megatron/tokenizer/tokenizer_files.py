"""Which kind of tokenizer a directory or file holds.  No tokenizer library is needed to tell."""

import re
from pathlib import Path

from endprompt_megatron.common.errors import InputError

HUGGING_FACE, SENTENCE_PIECE, TIKTOKEN = "Hugging Face", "SentencePiece", "tiktoken"
TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_MODEL = "tokenizer.model"
TOKENIZER_CONFIG = "tokenizer_config.json"

# The special tokens that LLaMA-3 has after its ranks: the file does not list them.
LLAMA3_RANKS, LLAMA3_SPECIAL = 128_000, 256

_RANK = re.compile(rb"\s*[A-Za-z0-9+/]+={0,2} \d+\s")


def find(path: Path) -> tuple[str, Path]:
    """The kind of the tokenizer at `path`, and the directory (Hugging Face) or file (the others) to read.

    Raises InputError if there is none.
    """
    if path.is_file():
        return _kind_of_model(path), path
    if not path.is_dir():
        raise InputError(f"{path}: no such directory; expected a tokenizer (tokenizer.json or tokenizer.model)")
    if (path / TOKENIZER_JSON).is_file():
        return HUGGING_FACE, path
    if (path / TOKENIZER_MODEL).is_file():
        return _kind_of_model(path / TOKENIZER_MODEL), path / TOKENIZER_MODEL
    if (path / TOKENIZER_CONFIG).is_file():
        return HUGGING_FACE, path
    raise InputError(f"{path}: holds no tokenizer; expected tokenizer.json or tokenizer.model")


def _kind_of_model(path: Path) -> str:
    """A tiktoken file is lines of base64 and rank; a SentencePiece model is binary."""
    with open(path, "rb") as file:
        head = file.read(4096)
    return TIKTOKEN if _RANK.match(head) else SENTENCE_PIECE


def size_of_model(path: Path) -> int:
    """Highest id + 1 of a `tokenizer.model`, LLaMA-3's special tokens included; 0 if it is neither of the two kinds."""
    if _kind_of_model(path) == TIKTOKEN:
        with open(path, "rb") as file:
            return sum(1 for line in file if line.strip()) + LLAMA3_SPECIAL
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size()
    except (OSError, RuntimeError):
        return 0
