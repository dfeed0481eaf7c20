"""Tokenizers in Hugging Face's form: `tokenizer.json`, or the files that transformers makes one of.

transformers takes seconds to import, and worker processes need nothing of it: it is asked for BOS and EOS
(special_tokens.py), and for everything where there is no tokenizer.json, when that is first wanted.
"""

import functools
import json
from pathlib import Path
from typing import Any

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.tokenizer.chat_template import ChatTemplate
from endprompt_megatron.tokenizer.fingerprint import checksum_of_files, pruned
from endprompt_megatron.tokenizer.special_tokens import ADDED_TOKENS, Ends, added_tokens, by_transformers
from endprompt_megatron.tokenizer.tokenizer import (
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    Tokenizer,
    refuse_surrogates,
)


class HuggingFace(Tokenizer):
    def __init__(self, directory: Path) -> None:
        self._directory, self._ends = directory, Ends(directory, lambda: self._transformers)
        self.backend = _read(directory)
        if self.backend is None:
            self.backend = getattr(self._transformers, "backend_tokenizer", None)
        if self.backend is not None:  # a tokenizer.json may carry both, and they would cut texts silently
            self.backend.no_truncation()
            self.backend.no_padding()
            self.backend.encode_special_tokens = True  # that is, as the text that they are

    @functools.cached_property
    def _transformers(self) -> Any:
        return by_transformers(self._directory)

    @functools.cached_property
    def vocab_size(self) -> int:
        return max((self.backend or self._transformers).get_vocab().values()) + 1

    @property
    def bos_id(self) -> int | None:
        return self._ends.bos_id

    @property
    def eos_id(self) -> int | None:
        return self._ends.eos_id

    @property
    def starts_with_bos(self) -> bool:
        return self._ends.starts_with_bos

    @functools.cached_property
    def _ranks(self) -> dict[bytes, int] | None:
        from endprompt_megatron.tokenizer.llama3 import ranks_of

        return None if self.backend is None else ranks_of(json.loads(self.backend.to_str()))

    @functools.cached_property
    def _tiktoken(self) -> Any:
        """tiktoken's encoder where it gives the same ids, which it does several times faster; otherwise None."""
        from endprompt_megatron.tokenizer.llama3 import encoding

        return None if self._ranks is None else encoding(self._ranks, {})

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        refuse_surrogates(texts)
        if self.backend is None:  # tokenizers that transformers writes in Python
            return [
                self._transformers.encode(text, add_special_tokens=False, split_special_tokens=True) for text in texts
            ]
        if self._tiktoken is None:
            return self._by_backend(texts)
        from endprompt_megatron.tokenizer.llama3 import has_long_run

        # tiktoken's stack would not hold the longest runs.
        return [
            self._by_backend([text])[0] if has_long_run(text) else self._tiktoken.encode_ordinary(text)
            for text in texts
        ]

    def _by_backend(self, texts: list[str]) -> list[list[int]]:
        # encode_batch_fast leaves out character offsets, which nobody here asks for.
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_prompt(self, text: str) -> list[int]:
        refuse_surrogates([text])
        if self.backend is None:
            return self._transformers.encode(text, add_special_tokens=False)
        self.backend.encode_special_tokens = False
        try:
            return self._by_backend([text])[0]
        finally:
            self.backend.encode_special_tokens = True

    def chat_template(self, where: str, file: str | None = None) -> ChatTemplate:
        if self.backend is None:
            return super().chat_template(where, file)
        if file is not None:
            try:
                source = Path(file).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"--chat-template {file}: cannot be read ({error})") from None
        else:
            source = self.own_template
            if source is None:
                raise InputError(
                    f"{where}: the tokenizer has no chat template; put one there as chat_template.jinja, so that the "
                    "exported model has it too, or try one with --chat-template FILE"
                )
        added = [token for token in self.backend.get_added_tokens_decoder().values() if not token.content.isspace()]
        tokens = tuple(token.content for token in added if token.special or token.content in source)
        names = tuple(
            (key, name) for key, name in self._transformers.special_tokens_map.items() if isinstance(name, str)
        )
        template = ChatTemplate(source, names, tokens)
        template.check(f"--chat-template {file}" if file else where)
        return template

    @functools.cached_property
    def own_template(self) -> str | None:
        """The directory's chat template, of several the default one; None if it has none."""
        found = self._transformers.chat_template
        return found.get("default") if isinstance(found, dict) else found

    def for_chat(self) -> Any:
        backend = type(self.backend).from_str(self.backend.to_str())
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False
        backend.post_processor = None  # it would cut blanks off the offsets
        return backend

    def decode(self, ids: list[int]) -> str:
        if self.backend is not None:
            return self.backend.decode(ids, skip_special_tokens=False)
        return self._transformers.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def convert(self, token: str) -> int | None:
        if self.backend is not None:
            return self.backend.token_to_id(token)
        return self._transformers.get_vocab().get(token)

    def rules(self) -> object:
        if self.backend is None:
            return {"files": checksum_of_files(self._directory)}
        if self._ranks is not None:
            from endprompt_megatron.tokenizer.llama3 import rules_of

            return rules_of(self._ranks)
        # Of the added tokens those count that are found in texts.
        content = json.loads(self.backend.to_str())
        content["added_tokens"] = [token for token in content["added_tokens"] if not token["special"]]
        vocabulary = {key: content["model"].pop(key) for key in ("vocab", "merges") if key in content["model"]}
        rest = {key: content[key] for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
        return [vocabulary, pruned(rest)]


def _read(directory: Path) -> Any | None:
    """tokenizer.json by its own library, with the tokens that other files add; None if there is none."""
    file = directory / TOKENIZER_JSON
    if not file.is_file():
        return None
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_file(str(file))
    for token in added_tokens(directory):
        known = backend.token_to_id(token.content)
        if known is None:
            flags = {"normalized": False, **dict(token.flags)}
            added = AddedToken(token.content, special=token.special, **flags)
            (backend.add_special_tokens if token.special else backend.add_tokens)([added])
            known = backend.token_to_id(token.content)
        if known != token.id:
            raise InputError(
                f"{directory}: token {token.content!r} has id {token.id} in {ADDED_TOKENS} or {TOKENIZER_CONFIG}, but "
                f"{known} with {TOKENIZER_JSON}; save the tokenizer once with transformers' save_pretrained"
            )
    return backend
