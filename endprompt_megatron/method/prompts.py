"""The end prompts: short terminal texts that stand for the end of the target window.

The published three are here by name; a recipe's `context.prompts` lists names, or `text:...` for a text of
one's own.  They are tokenised once, without special tokens and without padding: a prompt is as many tokens
as its text gives with the model's tokenizer.  A sample ends with a terminal segment: copies of a prompt, or of a
recall prompt (recall.py).
"""

from dataclasses import dataclass
from pathlib import Path

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.method.recall import Recall
from endprompt_megatron.tokenizer import Tokenizer, load_tokenizer

PROMPTS = {
    "EP_1": "This is the end of text, please pay attention here",
    "EP_2": "<|eot_id|>",
    "EP_3": "End.",
}
CUSTOM = "text:"


def tokenise_prompts(tokenizer_dir: Path | str, names: list[str], key: str = "context.prompts") -> list[list[int]]:
    """Token ids of each prompt, in the order of `names`.

    EP_2 is one token: the tokenizer's `<|eot_id|>`, or its end-of-sequence token where there is none.
    Raises InputError (naming `key`) for an empty list, an unknown name, or a text without tokens.
    """
    if not names:
        raise InputError(f"{key}=[]: give at least one of {', '.join(PROMPTS)} or {CUSTOM}...")
    for name in names:
        if name not in PROMPTS and not name.startswith(CUSTOM):
            raise InputError(f"{key}={name}: unknown prompt; use {', '.join(PROMPTS)} or {CUSTOM}...")
    tokenizer = load_tokenizer(tokenizer_dir)
    prompts = []
    for name in names:
        ids = _tokenise(tokenizer, name)
        if not ids:
            raise InputError(f"{key}={name}: gives no token with the tokenizer in {tokenizer_dir}")
        prompts.append(ids)
    return prompts


def _tokenise(tokenizer: Tokenizer, name: str) -> list[int]:
    if name == "EP_2":
        token = tokenizer.convert(PROMPTS[name])
        token = tokenizer.eos_id if token is None else token
        return [] if token is None else [token]
    return tokenizer.encode_prompt(name.removeprefix(CUSTOM) if name.startswith(CUSTOM) else PROMPTS[name])


@dataclass(frozen=True)
class Terminal:
    """A terminal segment: ids of one copy (0 where a span goes), tokens of all copies, its share of the samples."""

    prompt: tuple[int, ...]
    length: int
    share: float


def terminals(sources: list[tuple[float, list[list[int]]]], recall: Recall | None, copies: int) -> list[Terminal]:
    """Every terminal segment that samples end with, once each.

    `sources`: each one's share of the samples, and the prompts that its samples draw from; `recall` takes its share
    of the samples from all of them; `copies`: how often a prompt stands in a segment.
    """
    recalling = recall.share if recall is not None else 0.0
    shares: dict[tuple[int, ...], float] = {}
    for share, prompts in sources if recalling < 1 else []:
        for prompt in map(tuple, prompts):
            shares[prompt] = shares.get(prompt, 0.0) + (1 - recalling) * share / len(prompts)
    if recall is not None:
        shares[tuple(recall.prompt)] = recalling
    return [Terminal(prompt, copies * len(prompt), share) for prompt, share in shares.items()]
