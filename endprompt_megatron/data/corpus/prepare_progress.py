"""Progress of a long piece of work in bytes: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time

_SECONDS_BETWEEN_LINES = 15.0


class Progress:
    """Context manager; `add` counts bytes of text.  Lines go to stdout, so that stderr keeps to errors."""

    def __init__(self, what: str, total: int, *, shown: bool = True) -> None:
        self._what, self._total, self._done = what, total, 0
        self._started = self._said = time.monotonic()
        self._bar = None
        self._shown = shown
        if shown and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=what, unit="B", unit_scale=True, unit_divisor=1024)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, amount: int) -> None:
        """Note that `amount` more bytes are done."""
        self._done += amount
        if self._bar is not None:
            self._bar.update(amount)
        elif self._shown and time.monotonic() - self._said >= _SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            rate = self._done / (self._said - self._started) / 2**20
            share = self._done / max(self._total, 1)
            print(f"{self._what}: {share:.0%} of {self._total / 2**20:.0f} MiB, {rate:.1f} MiB/s", flush=True)
