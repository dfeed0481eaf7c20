"""How far an evaluation is: counted in tokens, since inputs differ too much in length to count the time by them."""

import sys
from typing import TYPE_CHECKING

from endprompt_megatron.common.progress import Progress

if TYPE_CHECKING:
    from endprompt_megatron.evaluate.requests import Request


class RequestProgress:
    """Shows what is being asked, on stderr; of several ranks one does (`shown`).  A context manager."""

    def __init__(self, *, shown: bool) -> None:
        self.shown = shown
        self._label, self._requests = "", 0
        self._expected: tuple[int, int] | None = None
        self._progress = Progress("", None, "tokens", shown=False)

    def __enter__(self) -> "RequestProgress":
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.close()

    def begin(self, label: str, expected: tuple[int, int] | None, parts: int) -> None:
        """A model is asked about so many requests and tokens, None if that is not known, over so many parts."""
        self._label, self._requests = label, 0
        self._expected = expected and (-(-expected[0] // parts), -(-expected[1] // parts))
        self._progress.close()
        self._progress = Progress(label, self._total(), "tokens", shown=self.shown, lines=sys.stderr)

    def say(self, text: str) -> None:
        """What happens now, beside the requests."""
        self._progress.restart(text, self._total())

    def note(self, text: str) -> None:
        """What is to be known before anything begins."""
        if self.shown:
            print(text, file=sys.stderr, flush=True)

    def known(self, request: "Request") -> None:
        """The request was answered before."""
        self._requests += 1
        if self._expected is not None:
            self._expected = self._expected[0], max(0, self._expected[1] - request.tokens)
            self._progress.total = self._total()

    def answered(self, request: "Request") -> None:
        """The request was answered now."""
        self._requests += 1
        length = f" {request.length}" if request.length else ""
        self._progress.title = f"{self._label} {request.suite} {request.task}{length}"
        of_all = f"/{self._expected[0]}" if self._expected else ""
        self._progress.add(request.tokens, f"{self._requests}{of_all} inputs")

    def _total(self) -> int | None:
        return self._expected and self._expected[1]
