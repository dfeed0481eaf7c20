"""LLaMA-3's `tokenizer.model`: byte-pair ranks in tiktoken's form, one line of base64 and rank each.

The file has neither the pattern that splits a text into words nor the special tokens; both are fixed by LLaMA-3's
own tokenizer, and so are the lengths at which it cuts a text in two before it is encoded.  LLaMA-4's file looks the
same and has others: it is refused by its number of ranks.

A tokenizer.json made of such a file gives the same ids; `ranks_of` recognises it, and tiktoken then encodes several
times faster than the library whose format it is.
"""

import base64
import functools
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import tiktoken

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.tokenizer.fingerprint import pruned
from endprompt_megatron.tokenizer.tokenizer import (
    LLAMA3_PATTERN,
    LLAMA3_RANKS,
    LLAMA3_SPECIAL,
    Tokenizer,
    refuse_surrogates,
)

# A longer text is encoded in blocks of this many characters, and a longer run of blanks, or of anything else, is cut.
BLOCK, RUN = 400_000, 25_000

# Names as of LLaMA-3.1 and later.  In 3.0 those that matter here (BOS, EOS, eot, headers) have the same ids, and the
# others are called reserved.
_NAMED = (
    "begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1 finetune_right_pad_id step_id "
    "start_header_id end_header_id eom_id eot_id python_tag image"
).split()
_SPECIAL = [
    f"<|{name}|>"
    for name in _NAMED + [f"reserved_special_token_{number}" for number in range(2, 2 + LLAMA3_SPECIAL - len(_NAMED))]
]
_RUNS = re.compile(r"\s+|\S+")


class Llama3(Tokenizer):
    """The same ids as LLaMA-3's own tokenizer.  Raises InputError for a file that is not LLaMA-3's."""

    def __init__(self, path: Path) -> None:
        self._ranks = read_ranks(path)
        special = {name: LLAMA3_RANKS + number for number, name in enumerate(_SPECIAL)}
        self._encoding = encoding(self._ranks, special)
        self._special = special
        self.vocab_size = LLAMA3_RANKS + LLAMA3_SPECIAL
        self.bos_id, self.eos_id = special["<|begin_of_text|>"], special["<|end_of_text|>"]
        self.starts_with_bos = True

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        refuse_surrogates(texts)
        # Not encode_ordinary_batch, which starts threads: the worker processes are the parallelism.
        encode = self._encoding.encode_ordinary
        return [encode(text) if len(text) <= RUN else _joined(encode, text) for text in texts]

    def encode_prompt(self, text: str) -> list[int]:
        return _joined(functools.partial(self._encoding.encode, allowed_special="all"), text)

    def decode(self, ids: list[int]) -> str:
        return self._encoding.decode(ids)

    def convert(self, token: str) -> int | None:
        return self._special.get(token, self._ranks.get(token.encode()))

    def rules(self) -> object:
        return rules_of(self._ranks)


def read_ranks(path: Path) -> dict[bytes, int]:
    """The ranks of a tiktoken file.  Raises InputError for a broken line or a number of ranks that is not LLaMA-3's."""
    ranks: dict[bytes, int] = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except ValueError:
                raise InputError(f"{path}:{number}: not a token in base64 and its rank; copy the file anew") from None
    if sorted(ranks.values()) != list(range(LLAMA3_RANKS)):
        raise InputError(
            f"{path}: {len(ranks)} ranks where LLaMA-3's tokenizer.model has {LLAMA3_RANKS}; for another model use its "
            "Hugging Face directory"
        )
    return ranks


def encoding(ranks: dict[bytes, int], special: dict[str, int]) -> tiktoken.Encoding:
    """tiktoken's encoder with LLaMA-3's pattern."""
    return tiktoken.Encoding("llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=special)


def rules_of(ranks: dict[bytes, int]) -> object:
    """Tokenizer.rules of these ranks with LLaMA-3's pattern."""
    digest = hashlib.sha256()
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        digest.update(b"%d %s\n" % (rank, token.hex().encode()))
    return {"pattern": LLAMA3_PATTERN, "ranks": digest.hexdigest()}


def blocks(text: str) -> Iterator[str]:
    """`text` as LLaMA-3's own tokenizer cuts it: at every 400,000 characters, and in runs of more than 25,000."""
    for start in range(0, len(text), BLOCK):
        block = text[start : start + BLOCK]
        if not has_long_run(block):
            yield block
            continue
        cut = 0
        for run in _RUNS.finditer(block):
            for at in range(run.start() + RUN, run.end(), RUN):
                yield block[cut:at]
                cut = at
        yield block[cut:]


def has_long_run(text: str) -> bool:
    """False only if there is no run of more than 25,000 blanks, or characters that are none, in `text`."""
    # Such a run covers two multiples of half its length; from one to the next is all that has to be looked at.
    half = RUN // 2
    return any(_RUNS.match(text, at, at + half).end() == at + half for at in range(0, len(text) - half + 1, half))


def _joined(encode, text: str) -> list[int]:
    return [identifier for block in blocks(text) for identifier in encode(block)]


def ranks_of(content: dict) -> dict[bytes, int] | None:
    """The ranks from which a tokenizer.json (its JSON, as tokenizers writes it) was made; None if it was not.

    None as well if anything in it could make a difference: a normaliser, another pattern, merges that are not all
    those of the ranks in their order, an added token that is looked for in texts.
    """
    rest = pruned({key: value for key, value in content["model"].items() if key not in ("vocab", "merges")})
    splitting = pruned({"normalizer": content["normalizer"], "pre_tokenizer": content["pre_tokenizer"]})
    added = [token for token in content["added_tokens"] if not token["special"]]
    if added or rest != _MODEL or splitting != _SPLITTING:
        return None
    vocabulary = content["model"]["vocab"]
    byte_of = _alphabet()
    try:
        ranks = {bytes(byte_of[character] for character in token): rank for token, rank in vocabulary.items()}
    except KeyError:
        return None
    complete = sorted(ranks.values()) == list(range(len(vocabulary))) and all(
        bytes([byte]) in ranks for byte in range(256)
    )
    return ranks if complete and content["model"]["merges"] == _merges(vocabulary) else None


# What tokenizers writes for LLaMA-3's rules, what is false or absent left out.
_MODEL = {"type": "BPE", "ignore_merges": True}
_SPLITTING = {
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated"},
            {"type": "ByteLevel"},
        ],
    }
}


def _merges(vocabulary: dict[str, int]) -> list[list[str]]:
    """All pairs of tokens that make a token, in the order in which its rank lets them."""
    merges = []
    for token in sorted(vocabulary, key=vocabulary.get):
        halves = ((token[:at], token[at:]) for at in range(1, len(token)))
        pairs = [(vocabulary[a], vocabulary[b], [a, b]) for a, b in halves if a in vocabulary and b in vocabulary]
        merges += [pair for *_, pair in sorted(pairs)]
    return merges


def _alphabet() -> dict[str, int]:
    """Bytes as byte-level BPE writes them: itself if it is printable, otherwise the next character from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + number): byte for number, byte in enumerate(others)}
