"""What a model is asked, one request at a time, and the response that is stored of it.

A suite makes its requests lazily and in a fixed order.  store.py keeps the responses, and the suite makes its results
of them, whichever process asked and when.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from endprompt_megatron.evaluate.engines.base import Engine, Prompt


@dataclass(frozen=True)
class Request:
    """One thing that a model is asked: its name (suite, task, length, number), its input, and how it is asked."""

    suite: str
    task: str
    length: int
    number: int
    content: bytes  # the whole input: a response belongs to these bytes and no others
    tokens: int  # that an engine reads, for the progress bar
    notes: dict = field(default_factory=dict)  # what its suite needs beside the record to score it; JSON
    ask: Callable[["Engine"], dict] | None = None  # gives the record, JSON; otherwise:
    prompt: "Prompt | None" = None
    read: Callable[[list[int]], dict] | None = None  # the record from what was generated
    alone: bool = False  # asked of no engine, once there is none in memory

    def key(self, model: str) -> str:
        """Key of the response of the model with that fingerprint."""
        digest = hashlib.sha256()
        digest.update(repr((model, self.suite, self.task, self.length, self.number)).encode())
        digest.update(self.content)
        return digest.hexdigest()[:32]

    def name(self) -> dict:
        """Suite, task, length and number."""
        return {"suite": self.suite, "task": self.task, "length": self.length, "number": self.number}

    def response(self, record: dict) -> "Response":
        """The response with that record."""
        return Response(**self.name(), notes=self.notes, record=record)


@dataclass(frozen=True)
class Response:
    """What a model gave: the request's name and notes, and the record that its suite made of it; all JSON."""

    suite: str
    task: str
    length: int
    number: int
    notes: dict
    record: dict


def content_of(*parts: object) -> bytes:
    """Bytes that tell inputs apart: arrays by their values, the rest by its repr."""
    return b"\0".join(
        part.astype(np.int64).tobytes() if isinstance(part, np.ndarray) else repr(part).encode() for part in parts
    )


def ask(engine: "Engine", requests: Iterable[Request]) -> Iterator[tuple[Request, dict]]:
    """Every request with its record, as they are finished.  An engine that takes many prompts at once gets them so."""
    for generates, group in itertools.groupby(requests, key=lambda request: request.prompt is not None):
        if generates:
            yield from _generate(engine, group)
        else:
            for request in group:
                yield request, request.ask(engine)


def _generate(engine: "Engine", requests: Iterable[Request]) -> Iterator[tuple[Request, dict]]:
    from endprompt_megatron.evaluate.engines.base import generate_all

    under_way: dict[int, Request] = {}

    def prompts() -> Iterator["Prompt"]:
        for request in requests:
            under_way[id(request.prompt)] = request
            yield request.prompt

    for prompt, generated in generate_all(engine, prompts()):
        request = under_way.pop(id(prompt))
        yield request, request.read(generated)


def responses(engine: "Engine", requests: Iterable[Request]) -> list[Response]:
    """The responses to all requests, in the order of the requests, with nothing stored."""
    requests = list(requests)
    records = {id(request): record for request, record in ask(engine, requests)}
    return [request.response(records[id(request)]) for request in requests]
