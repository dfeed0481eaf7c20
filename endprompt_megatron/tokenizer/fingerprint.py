"""A checksum of what decides the ids that a text gets, and nothing else.

It is taken over `Tokenizer.rules` and BOS and EOS, not over files: a chat template, the length that a model is
said to have or the names of reserved tokens do not matter, a piece, a merge or a normaliser does.  A LLaMA-3
tokenizer.json and the tiktoken file that it was made of have the same.
"""

import hashlib
import json
from pathlib import Path

from endprompt_megatron.tokenizer.tokenizer import Tokenizer

# Stands before the checksum: other forms may come.
FORMAT = "ids1:"

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


def fingerprint_of(tokenizer: Tokenizer) -> str:
    """FORMAT and a SHA-256: equal for tokenizers that give the same ids, BOS and EOS by the same rules."""
    ends = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.starts_with_bos]
    content = json.dumps([tokenizer.rules(), ends], sort_keys=True)
    return FORMAT + hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


def checksum_of_files(path: Path) -> str:
    """SHA-256 over names and contents of all files of a tokenizer, for tokenizers that only transformers can read."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else [path / name for name in _FILES if (path / name).is_file()]:
        content = file.read_bytes()
        digest.update(json.dumps([file.name, len(content)]).encode())
        digest.update(content)
    return digest.hexdigest()


def pruned(value: object) -> object:
    """JSON without what is null or false, which newer versions write where older ones wrote nothing."""
    if isinstance(value, dict):
        kept = {key: pruned(item) for key, item in value.items() if key not in _NO_RULE}
        return {key: item for key, item in kept.items() if item is not None and item is not False}
    return [pruned(item) for item in value] if isinstance(value, list) else value


_NO_RULE = ("trim_offsets",)  # where a token stands in the text, not which it is
