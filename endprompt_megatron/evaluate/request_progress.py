"""A progress bar on a terminal; elsewhere a line now and then, so that a log shows that the run is alive."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from endprompt_megatron.evaluate.requests import Request

LINE_EVERY_S = 30


class Progress:
    """Shows nothing; the others say what has been read and how long the rest will take."""

    def begin(self, label: str, expected: tuple[int, int] | None, parts: int) -> None:
        """A model is asked about so many requests and tokens, None if that is not known, over so many parts."""

    def say(self, text: str) -> None:
        """What happens now, beside the requests."""

    def note(self, text: str) -> None:
        """What is to be known before anything begins."""

    def known(self, request: "Request") -> None:
        """The request was answered before."""

    def answered(self, request: "Request") -> None:
        """The request was answered now."""


class Lines(Progress):
    """A line at most every 30 seconds, on stderr."""

    def __init__(self) -> None:
        self.label, self.items, self.tokens, self.begun, self.last = "", 0, 0, 0.0, time.monotonic()
        self.expected: tuple[int, int] | None = None
        self.before = 0  # items

    def begin(self, label: str, expected: tuple[int, int] | None, parts: int) -> None:
        """See Progress."""
        self.label, self.items, self.tokens, self.before = label, 0, 0, 0
        self.expected = expected and (-(-expected[0] // parts), -(-expected[1] // parts))
        self.begun = time.monotonic()

    def say(self, text: str) -> None:
        """See Progress."""
        self._line(text)
        self.begun = time.monotonic()

    def note(self, text: str) -> None:
        """See Progress."""
        print(text, file=sys.stderr, flush=True)

    def known(self, request: "Request") -> None:
        """See Progress."""
        self.before += 1
        if self.expected is not None:
            self.expected = self.expected[0], max(0, self.expected[1] - request.tokens)

    def answered(self, request: "Request") -> None:
        """See Progress."""
        self.items += 1
        self.tokens += request.tokens
        self._line(describe(self.label, request))

    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / max(time.monotonic() - self.begun, 1e-9)

    def _line(self, text: str) -> None:
        if time.monotonic() - self.last < LINE_EVERY_S:
            return
        self.last = time.monotonic()
        done = f"{self.before + self.items}" + (f"/{self.expected[0]}" if self.expected else "")
        left = max(0, self.expected[1] - self.tokens) / self.rate() if self.expected and self.tokens else None
        rest = f", about {duration(left)} left" if left is not None else ""
        print(f"{text}: {done} inputs, {self.tokens:,} tokens, {self.rate():,.0f}/s{rest}", file=sys.stderr, flush=True)


class Bar(Lines):
    """tqdm's bar over tokens: inputs differ too much in length to count the time by them."""

    def __init__(self) -> None:
        super().__init__()
        self.bar: Any = None

    def begin(self, label: str, expected: tuple[int, int] | None, parts: int) -> None:
        """See Progress."""
        from tqdm import tqdm

        super().begin(label, expected, parts)
        self.close()
        total = self.expected and self.expected[1]
        self.bar = tqdm(total=total, unit="token", unit_scale=True, dynamic_ncols=True, leave=False)

    def say(self, text: str) -> None:
        """See Progress."""
        self.bar.set_description(text)
        self.bar.reset(self.expected and self.expected[1])

    def known(self, request: "Request") -> None:
        """See Progress."""
        super().known(request)
        self.bar.total = self.expected and self.expected[1]

    def answered(self, request: "Request") -> None:
        """See Progress."""
        super().answered(request)
        self.bar.set_description(describe(self.label, request), refresh=False)
        done = f"{self.before + self.items}" + (f"/{self.expected[0]}" if self.expected else "")
        self.bar.set_postfix_str(f"{done} inputs", refresh=False)
        self.bar.update(request.tokens)

    def _line(self, text: str) -> None:
        pass

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()


def describe(label: str, request: "Request") -> str:
    """A request's name in a line."""
    return f"{label} {request.suite} {request.task}" + (f" {request.length}" if request.length else "")


def duration(seconds: float) -> str:
    """Seconds as "40 s", "12 min" or "3.4 h"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@contextlib.contextmanager
def bar(shown: bool = True) -> Iterator[Progress]:
    """The progress of this process: a bar, lines, or nothing where another rank speaks."""
    progress = Progress() if not shown else Bar() if sys.stderr.isatty() else Lines()
    try:
        yield progress
    finally:
        if isinstance(progress, Bar):
            progress.close()
