"""Progress of long work: a bar on a terminal; elsewhere a line now and then, so that a log shows that it is alive."""

import sys
import time
from typing import Any, TextIO

from endprompt_megatron.common.units import format_bytes, format_duration

_SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Context manager; `add` counts what is done of `total`, None where that is not known.

    `unit` is "bytes" or the name of what is counted.  The bar goes to stderr, lines to `lines`, by default stdout, so
    that stderr keeps to errors.  Not `shown`, it only counts: one rank of several shows its progress.
    """

    def __init__(
        self, title: str, total: int | None, unit: str = "bytes", *, shown: bool = True, lines: TextIO | None = None
    ) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = 0
        self._shown, self._lines = shown, lines
        self._started = self._last_line = time.monotonic()
        self._bar: Any = None
        if shown and sys.stderr.isatty():
            from tqdm import tqdm

            short = "B" if unit == "bytes" else f" {unit}"
            self._bar = tqdm(total=total, desc=title, unit=short, unit_scale=True, dynamic_ncols=True, leave=False)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()

    def add(self, amount: int, note: str = "") -> None:
        """Note that `amount` more is done.  `note` is shown beside it."""
        self.done += amount
        if self._bar is not None:
            self._bar.set_description_str(self.title, refresh=False)
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.total = self.total
            self._bar.update(amount)
        elif self._shown and time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self.write_line(note)

    def restart(self, title: str, total: int | None) -> None:
        """Begin to count anew, under another title."""
        self.title, self.total, self.done = title, total, 0
        self._started = time.monotonic()
        if self._bar is not None:
            self._bar.set_description_str(title, refresh=False)
            self._bar.reset(total)

    @property
    def rate(self) -> float:
        """What is done in a second."""
        return self.done / max(time.monotonic() - self._started, 1e-9)

    def write_line(self, note: str = "") -> None:
        """Print how far the work is."""
        self._last_line = time.monotonic()
        amount = format_bytes if self.unit == "bytes" else "{:,.0f}".format
        of_total = f" of {amount(self.total)}" if self.total else ""
        parts = [f"{amount(self.done)}{of_total}{'' if self.unit == 'bytes' else f' {self.unit}'}"]
        if self.done:
            parts.append(f"{amount(self.rate)}/s")
        if self.done and self.total:
            seconds = max(0, self.total - self.done) / self.rate
            parts.append(f"about {format_duration(max(1, round(seconds)))} left")
        if note:
            parts.append(note)
        print(f"{self.title}: {', '.join(parts)}", file=self._lines, flush=True)
