"""Conversations as token ids, and which of them are answers: what `tools/prepare_data.py --chat` stores.

PREFIX.bin holds the ids as of any text, PREFIX.mask (.bin and .idx, an indexed dataset of its own, uint8) 1 for each
token of an answer, the token that ends it included, and 0 for every other.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import orjson

from endprompt_megatron.common.errors import InputError
from endprompt_megatron.data.corpus.rejects import Bad
from endprompt_megatron.data.indexed import Index, path_of, read_idx
from endprompt_megatron.tokenizer.chat_template import BadTemplate, ChatTemplate, Refused

MASK = ".mask"
KIND = "chat"  # under "kind" in the manifest


class Encoded(NamedTuple):
    """Bytes of a conversation's ids and of its mask, as they are stored."""

    ids: bytes
    mask: bytes


class ConversationEncoder:
    """Conversations (JSON of chat.conversation_of) to ids of `dtype` and masks.

    `backend` is a tokenizers.Tokenizer that finds special tokens in a text and gives offsets (HuggingFace.for_chat).
    """

    def __init__(self, template: ChatTemplate, backend, dtype: np.dtype) -> None:
        self._template, self._backend, self._dtype = template, backend, dtype

    def encode(self, texts: list[str]) -> list[Encoded | Bad]:
        """Each conversation's ids and mask, or why it has none."""
        written = [self._written(orjson.loads(text)) for text in texts]
        good = [each for each in written if not isinstance(each, Bad)]
        encodings = iter(self._backend.encode_batch([text for text, _ in good], add_special_tokens=False))
        return [each if isinstance(each, Bad) else self._encoded(next(encodings), each[1]) for each in written]

    def _written(self, messages: list[dict]) -> tuple[str, list[tuple[int, int]]] | Bad:
        for number, message in enumerate(messages, start=1):
            if token := self._template.token_in(message["content"]):
                return Bad("special_token", f"turn {number} holds {token!r}, which the tokenizer takes for a token")
        try:
            return self._template.write(messages)
        except Refused as error:
            return Bad("template_refused", f"the chat template refuses it ({error})")
        except BadTemplate as error:
            return Bad("bad_template", f"the chat template does not fit: {error}", skippable=False)

    def _encoded(self, encoding, spans: list[tuple[int, int]]) -> Encoded:
        ids = np.array(encoding.ids, dtype=self._dtype)
        starts, ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
        mask = np.zeros(len(ids), dtype=np.uint8)
        for start, stop in spans:
            # Every token with a character of the answer, as transformers' assistant_masks has them.
            mask[np.searchsorted(ends, start, side="right") : np.searchsorted(starts, stop, side="left")] = 1
        return Encoded(ids.tobytes(), mask.tobytes())


def answers_of(prefix: Path | str, index: Index) -> np.ndarray:
    """The mask of a whole dataset of conversations, uint8 [tokens], memory-mapped.  Raises InputError."""
    mask = read_idx(f"{prefix}{MASK}")
    if mask.dtype != np.uint8 or not np.array_equal(mask.lengths, index.lengths):
        raise InputError(f"{prefix}{MASK}.idx: does not go with {path_of(prefix, '.idx').name}; make both again")
    return np.memmap(path_of(prefix, f"{MASK}.bin"), dtype=np.uint8, mode="r")
