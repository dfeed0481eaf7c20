"""Signals that ask a run to stop.  No torch: a tool listens before its slow imports."""

import contextlib
import signal
from collections.abc import Iterator


class StopSignal:
    """SIGTERM, SIGUSR1 and SIGUSR2 ask for a stop; all ranks check for it in each step (runtime.agreed)."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self) -> None:
        self.received: int | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopSignal"]:
        previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        self.received = number
