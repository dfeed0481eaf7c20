"""One small interface to the tokenizers that a LLaMA-family checkpoint can bring.

What a directory holds decides: `tokenizer.json` is read by the library that defines it (tokenizers), a lone
`tokenizer.model` by sentencepiece (LLaMA-2, Mistral) or as LLaMA-3's tiktoken file, whichever its content is, and
anything else through transformers.  transformers is not asked for ids where there is a choice: version 5 replaces
the rules in a LLaMA-2 tokenizer.json by its own, and turns a tokenizer.model into something that differs from
sentencepiece in runs of blanks.  BOS, EOS and added tokens of a directory are those that transformers uses
(special_tokens.py), whatever its main file is.

No special token is ever added here, and none is recognised in a text: prepare.py and prompts.py place them on purpose.
"""

from pathlib import Path

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.tokenizer.tokenizer import HUGGING_FACE, TIKTOKEN, Tokenizer, find

__all__ = ["Tokenizer", "load_tokenizer"]


def load_tokenizer(path: Path | str) -> Tokenizer:
    """The tokenizer of a directory, or of a `tokenizer.model` given itself.

    Raises InputError if there is none or it cannot be read.
    """
    kind, place = find(Path(path))
    try:
        if kind == HUGGING_FACE:
            from endprompt_megatron.tokenizer.huggingface import HuggingFace

            return HuggingFace(place)
        if kind == TIKTOKEN:
            from endprompt_megatron.tokenizer.llama3 import Llama3

            return Llama3(place)
        from endprompt_megatron.tokenizer.sentencepiece_model import SentencePiece

        return SentencePiece(place, place.parent if place != Path(path) else None)
    except InputError:
        raise
    except Exception as error:  # each backend has its own errors for broken files, down to bare Exception
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: the tokenizer cannot be read ({reason})") from None
