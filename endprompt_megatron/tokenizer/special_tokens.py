"""BOS, EOS and added tokens of a tokenizer's directory, whatever its main file is: those that transformers uses.

A tokenizer's main file (tokenizer.json, tokenizer.model) need not name them.  tokenizer_config.json,
special_tokens_map.json and added_tokens.json do, some in several ways, which is why transformers is asked; where
nothing of that says how documents begin and end, config.json may.  Code in the directory is never run.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.common.files import read_json
from endprompt_megatron.tokenizer.tokenizer import TOKENIZER_CONFIG, TOKENIZER_JSON

ADDED_TOKENS, TOKENS_MAP = "added_tokens.json", "special_tokens_map.json"


@dataclass(frozen=True)
class AddedToken:
    """A token beside those of the main file; a special one is never found in a text.

    `flags`: what else the tokenizers library takes of one (lstrip, rstrip, single_word, normalized).
    """

    content: str
    id: int
    special: bool
    flags: tuple[tuple[str, bool], ...] = ()


def added_tokens(directory: Path) -> list[AddedToken]:
    """Tokens that added_tokens.json and tokenizer_config.json name, by id.  Raises InputError for broken files."""
    config = _json(directory, TOKENIZER_CONFIG, "a tokenizer's configuration")
    found: dict[int, AddedToken] = {}
    named = _named_special(directory, config)
    for content, identifier in _json(directory, ADDED_TOKENS, "added tokens").items():
        if not isinstance(identifier, int):
            raise InputError(f"{directory / ADDED_TOKENS}: {content!r}: {identifier!r} should be a token id")
        found[identifier] = AddedToken(content, identifier, content in named)
    for identifier, token in (config.get("added_tokens_decoder") or {}).items():
        flags = [
            (name, bool(token[name])) for name in ("lstrip", "rstrip", "single_word", "normalized") if name in token
        ]
        special = bool(token.get("special")) or token["content"] in named
        found[int(identifier)] = AddedToken(token["content"], int(identifier), special, tuple(flags))
    return [found[identifier] for identifier in sorted(found)]


def _named_special(directory: Path, config: dict) -> set[str]:
    """The contents of tokens that have a role: BOS, EOS, padding, and those that are listed."""
    named: set[str] = set()
    for values in (config, _json(directory, TOKENS_MAP, "a map of special tokens")):
        for key, value in values.items():
            if key.endswith("_token") and isinstance(value, str | dict):
                named.add(_content(value))
            elif key in ("additional_special_tokens", "extra_special_tokens") and value:
                named |= {_content(each) for each in (value.values() if isinstance(value, dict) else value)}
    return named


def _content(token: str | dict) -> str:
    return token if isinstance(token, str) else str(token.get("content"))


def _json(directory: Path, name: str, what: str) -> dict:
    return read_json(directory / name, what) if (directory / name).is_file() else {}


def by_transformers(directory: Path) -> Any:
    """transformers' tokenizer of a directory; none of the directory's own code is run.  Raises InputError."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    config = _json(directory, TOKENIZER_CONFIG, "a tokenizer's configuration")
    classes = [functools.partial(AutoTokenizer.from_pretrained, trust_remote_code=False)]
    if (directory / TOKENIZER_JSON).is_file():
        # Needs neither the class that the directory's code would define nor what config.json says of the model.
        classes.insert(0 if config.get("auto_map") else 1, PreTrainedTokenizerFast.from_pretrained)
    reason = ""
    for load in classes:
        try:
            return load(directory, local_files_only=True)
        except Exception as error:  # down to bare Exception
            reason = reason or " ".join(str(error).split())[:200]
    _json(directory, "config.json", "a Hugging Face config")  # whose faults are not the tokenizer's
    raise InputError(f"{directory}: the tokenizer cannot be read ({reason})")


class Ends:
    """How a directory's tokenizer begins and ends documents; asked for when it is first wanted."""

    def __init__(self, directory: Path, load: Callable[[], Any]) -> None:
        """`load` gives transformers' tokenizer of the directory."""
        self._directory, self._load = directory, load

    @functools.cached_property
    def bos_id(self) -> int | None:
        """Id of BOS, None where there is none."""
        return self._id("bos_token_id")

    @functools.cached_property
    def eos_id(self) -> int | None:
        """Id of EOS, None where there is none."""
        return self._id("eos_token_id")

    @functools.cached_property
    def starts_with_bos(self) -> bool:
        """Whether the tokenizer puts BOS before a text when it is asked for special tokens."""
        return self.bos_id is not None and self._load()("a").input_ids[:1] == [self.bos_id]

    def _id(self, key: str) -> int | None:
        found = getattr(self._load(), key)
        if found is None:
            values = _json(self._directory, "config.json", "a Hugging Face config").get(key)
            found = values[0] if isinstance(values, list) and values else values
        return found if isinstance(found, int) else None


@dataclass(frozen=True)
class ModelEnds:
    """The same for a tokenizer.model, which transformers has no part in: BOS stands before texts unless it is said."""

    bos_id: int | None
    eos_id: int | None
    starts_with_bos: bool


def ends_beside(directory: Path, ids: Callable[[str], int | None], bos: int | None, eos: int | None) -> ModelEnds:
    """Ends of a tokenizer.model by the files beside it; `bos` and `eos` are its own.

    `ids` gives a token's id by its content, None for none.
    """
    said = _json(directory, TOKENS_MAP, "a map of special tokens")
    said |= _json(directory, TOKENIZER_CONFIG, "a tokenizer's configuration")
    bos, eos = (
        own if key not in said else None if said[key] is None else ids(_content(said[key]))
        for key, own in (("bos_token", bos), ("eos_token", eos))
    )
    return ModelEnds(bos, eos, bos is not None and said.get("add_bos_token") is not False)
