"""A progress bar in bytes on a terminal, nothing elsewhere; sizes in words."""

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def byte_progress(total: int, title: str, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Yield a function that advances the bar by a number of bytes."""
    from tqdm import tqdm

    with tqdm(
        total=total,
        desc=title,
        unit="B",
        unit_scale=True,
        disable=not (shown and sys.stderr.isatty()),
        dynamic_ncols=True,
    ) as bar:
        yield lambda count: bar.update(count) and None


def in_words(count: float) -> str:
    """A number of bytes for people, in decimal units as disks are sold: 272.3 MB."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count /= 1000
        units.pop(0)
    return f"{count:.0f} bytes" if units[0] == "bytes" else f"{count:.1f} {units[0]}"
