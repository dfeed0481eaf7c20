"""A tokenizer's chat template: a conversation as the text that the model reads, and where in it the answers stand.

The Jinja environment is that of transformers' apply_chat_template (a test compares the two), apart from the clock:
a template that asks for the date gets 26 July 2024, as LLaMA-3's do without a clock, so that what is written does
not depend on the day.  Workers need no transformers for it.

Where an answer stands: between the template's own {% generation %} marks; without them, from the end of what the
template writes up to the answer's turn, generation prompt included, to the end of what it writes up to the turn
after.  Both ways end with the token that ends the turn, which a model learns to stop by.
"""

import functools
import hashlib
import json
import re
from dataclasses import dataclass
from datetime import datetime
from typing import Any, ClassVar

from endprompt_megatron.common.errors import InputError

_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_TODAY = datetime(2024, 7, 26)

Spans = list[tuple[int, int]]


class Refused(Exception):
    """The template takes no such conversation."""


class BadTemplate(Exception):
    """From what the template writes, it cannot be told which text is an answer."""


@dataclass(frozen=True)
class ChatTemplate:
    """`source` is Jinja; `names` what transformers gives a template besides, such as ("bos_token", "<s>").

    `tokens`: texts of the tokenizer's added tokens that end turns and that no turn may contain.
    """

    source: str
    names: tuple[tuple[str, str], ...]
    tokens: tuple[str, ...]

    def check(self, where: str) -> None:
        """Raise InputError, naming `where`, unless the source is a template."""
        import jinja2

        try:
            _compiled(self.source)
        except jinja2.TemplateError as error:
            raise InputError(f"{where}: not a Jinja template ({' '.join(str(error).split())})") from None

    @functools.cached_property
    def _token(self) -> re.Pattern:
        return re.compile("|".join(map(re.escape, sorted(self.tokens, key=len, reverse=True))) or "(?!)")

    def token_in(self, text: str) -> str | None:
        """The first of `tokens` that a text contains."""
        found = self._token.search(text)
        return found.group() if found else None

    def write(self, messages: list[dict], tools: list[dict] | None = None) -> tuple[str, Spans]:
        """A conversation as text, and (start, stop) of every answer in it, in characters; `tools` that it may call.

        Raises Refused, and BadTemplate with the number of the turn.
        """
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if _MARKS.search(self.source):
            text, marked = self._marked(messages, tools)
            if len(marked) != len(answers):
                raise BadTemplate(f"marks {len(marked)} of {len(answers)} answers with {{% generation %}}")
            spans = list(zip(answers, marked, strict=True))
        else:
            text = self._rendered(messages, tools)
            spans = [(number, self._between(messages, tools, number, text)) for number in answers]
        return text, [self._with_its_end(text, *span, number + 1) for number, span in spans]

    def turn_ends(self) -> list[str]:
        """The tokens that end answers, inside of a conversation and at its end; which a model learns to stop by.

        Raises InputError for a template that takes no short conversation.
        """
        exchange = ["user", "assistant"]
        for roles in (exchange * 2, exchange, ["system", *exchange]):
            try:
                text, spans = self.write([{"role": role, "content": "a"} for role in roles])
                break
            except (Refused, BadTemplate) as error:
                reason = error
        else:
            raise InputError(f"the chat template takes no conversation of one question and answer ({reason})")
        longest_first = sorted(self.tokens, key=len, reverse=True)
        ends = [next(token for token in longest_first if text[:stop].endswith(token)) for _, stop in spans]
        return list(dict.fromkeys(ends))

    def _between(self, messages: list[dict], tools: list[dict] | None, number: int, text: str) -> tuple[int, int]:
        before = self._rendered(messages[:number], tools, add_generation_prompt=True)
        after = text if number + 1 == len(messages) else self._rendered(messages[: number + 1], tools)
        for beginning, what in ((before, "up to"), (after, "up to and with")):
            if not text.startswith(beginning):
                raise BadTemplate(
                    f"what it writes {what} turn {number + 1} is not the beginning of the complete conversation; put "
                    "{% generation %} and {% endgeneration %} around answers"
                )
        answer = text[len(before) : len(after)]
        if not answer.lstrip().startswith(messages[number]["content"].strip()):
            raise BadTemplate(
                f"its generation prompt does not lead up to the answer of turn {number + 1}: {answer[:30]!r} follows "
                "it; put {% generation %} and {% endgeneration %} around answers"
            )
        return len(before), len(after)

    def _with_its_end(self, text: str, start: int, stop: int, turn: int) -> tuple[int, int]:
        """The span of an answer without the blanks after the token that ends the turn.  Raises BadTemplate."""
        stop = start + len(text[start:stop].rstrip())
        if not text[start:stop].endswith(self.tokens):
            raise BadTemplate(
                f"the answer of turn {turn} ends in {text[max(start, stop - 15) : stop]!r} and not in a token of the "
                "tokenizer's such as EOS: the model would not learn to stop"
            )
        return start, stop

    def _rendered(self, messages: list[dict], tools: list[dict] | None, add_generation_prompt: bool = False) -> str:
        return "".join(self._blocks(messages, tools, add_generation_prompt))

    def _marked(self, messages: list[dict], tools: list[dict] | None) -> tuple[str, Spans]:
        marks = _compiled(self.source).environment.marks
        marks.begin()
        for block in self._blocks(messages, tools, False):
            marks.written += len(block)
            marks.blocks.append(block)
        return "".join(marks.blocks), list(marks.spans)

    def _blocks(self, messages: list[dict], tools: list[dict] | None, add_generation_prompt: bool) -> Any:
        try:
            yield from _compiled(self.source).generate(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **dict(self.names),
            )
        except Exception as error:  # raise_exception, or whatever its expressions meet
            raise Refused(" ".join(str(error).split())[:200] or type(error).__name__) from None


def digest_of_template(source: str) -> str:
    """Hexadecimal SHA-256 of a template."""
    return hashlib.sha256(source.encode()).hexdigest()


class _Marks:
    """Where {% generation %} blocks lie in what is being written."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.written, self.blocks, self.spans = 0, [], []


@functools.lru_cache(maxsize=4)
def _compiled(source: str) -> Any:
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """{% generation %}: a block that is written as it is; its place is noted."""

        tags: ClassVar[set[str]] = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_noted"), [], [], body).set_lineno(line)

        def _noted(self, caller: Any) -> str:
            written, marks = caller(), self.environment.marks
            marks.spans.append((marks.written, marks.written + len(written)))
            return written

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": _TODAY.strftime}
    environment.marks = _Marks()
    return environment.from_string(source)
