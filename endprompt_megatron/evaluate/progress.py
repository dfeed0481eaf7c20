"""A progress bar on a terminal; elsewhere a line now and then, so that a log shows that the run is alive."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

LINE_EVERY_S = 30


@contextlib.contextmanager
def bar() -> Iterator[Callable[[int], Callable[[str], None]]]:
    """Yields `progress(total) -> tick`; `tick(text)` says what begins now (a text of "loading ..." is no step)."""
    shown = []

    def progress(total: int) -> Callable[[str], None]:
        if sys.stderr.isatty():
            from tqdm import tqdm

            shown.append(tqdm(total=total, unit="input", dynamic_ncols=True, leave=False))
        begun, last = -1, time.monotonic()

        def tick(text: str) -> None:
            nonlocal begun, last
            step = 0 if text.startswith("loading ") else 1
            if shown:
                shown[-1].update(step if begun >= 0 else 0)
                shown[-1].set_description(text)
            elif time.monotonic() - last > LINE_EVERY_S:
                last = time.monotonic()
                print(f"{max(begun, 0)}/{total} {text}", file=sys.stderr, flush=True)
            begun += step

        return tick

    try:
        yield progress
    finally:
        for each in shown:
            each.close()
