"""Documents to token ids as they are stored: whole texts by a tokenizer, conversations by a chat template.

words.py has a faster encoder of texts for the tokenizers that allow it.
"""

from typing import NamedTuple, Protocol

import numpy as np
import orjson

from endprompt_megatron.data.corpus.rejects import Reject
from endprompt_megatron.tokenizer import Tokenizer
from endprompt_megatron.tokenizer.chat_template import BadTemplate, ChatTemplate, Refused


class Encoded(NamedTuple):
    """Bytes of a conversation's ids, and of the mask that says which of them are answers."""

    ids: bytes
    mask: bytes


class Encoder(Protocol):
    """What makes ids of documents: bytes of a text's ids, or of a conversation's ids and mask."""

    def encode(self, texts: list[str]) -> list[bytes] | list[Encoded | Reject]: ...


class WholeTexts:
    """Ids of texts by a tokenizer, as bytes of `dtype`."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype) -> None:
        self._tokenizer, self._dtype = tokenizer, dtype

    def encode(self, texts: list[str]) -> list[bytes]:
        """Ids of each text, which must be valid Unicode."""
        return [np.array(ids, dtype=self._dtype).tobytes() for ids in self._tokenizer.encode_batch(texts)]


class Conversations:
    """Conversations (JSON of chat_formats.conversation_of) to ids of `dtype` and masks.

    `backend` is a tokenizers.Tokenizer that finds special tokens in a text and gives offsets (HuggingFace.for_chat).
    """

    def __init__(self, template: ChatTemplate, backend, dtype: np.dtype) -> None:
        self._template, self._backend, self._dtype = template, backend, dtype

    def encode(self, texts: list[str]) -> list[Encoded | Reject]:
        """Each conversation's ids and mask, or why it has none."""
        written = [self._written(orjson.loads(text)) for text in texts]
        good = [each for each in written if not isinstance(each, Reject)]
        encodings = iter(self._backend.encode_batch([text for text, _ in good], add_special_tokens=False))
        return [each if isinstance(each, Reject) else self._encoded(next(encodings), each[1]) for each in written]

    def _written(self, record: list[dict] | dict) -> tuple[str, list[tuple[int, int]]] | Reject:
        messages, tools = (record["messages"], record["tools"]) if isinstance(record, dict) else (record, None)
        for number, message in enumerate(messages, start=1):
            said = message["content"] + orjson.dumps(message.get("tool_calls", "")).decode()
            if token := self._template.token_in(said):
                return Reject("special_token", f"turn {number} contains {token!r}, a special token of the tokenizer")
        for used, name in ((tools, "tools"), (any("tool_calls" in each for each in messages), "tool_calls")):
            if used and name not in self._template.source:
                return Reject("template_refused", f"the chat template writes no {name}, and the conversation has some")
        try:
            return self._template.write(messages, tools)
        except Refused as error:
            return Reject("template_refused", f"the chat template refuses it ({error})")
        except BadTemplate as error:
            return Reject("bad_template", f"the chat template does not fit: {error}", skippable=False)

    def _encoded(self, encoding, spans: list[tuple[int, int]]) -> Encoded:
        ids = np.array(encoding.ids, dtype=self._dtype)
        starts, ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
        mask = np.zeros(len(ids), dtype=np.uint8)
        for start, stop in spans:
            # Every token with a character of the answer, as transformers' assistant_masks has them.
            mask[np.searchsorted(ends, start, side="right") : np.searchsorted(starts, stop, side="left")] = 1
        return Encoded(ids.tobytes(), mask.tobytes())
